"""Tensors made like a sharded one, and random ones with the values of one device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpatch.collectives import memory_format
from distpatch.rules.fallback import fallback
from distpatch.rules.pointwise import pointwise
from distpatch.rules.registry import named, rule, wrap
from distpatch.tensor import PatchTensor, shard_in


@rule(*named("zeros_like", "ones_like", "empty_like", "full_like"))
def like(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> PatchTensor:
    return wrap(func(input.local, *args, **kwargs), input)


@rule(*named("rand_like", "randn_like", "randint_like"))
def random_like(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> PatchTensor:
    """Every rank draws the whole tensor from the generator that all share, and keeps its rows."""
    model = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input.local))
    return shard_in(input.region, func(model, *args, **kwargs), input.rows)


@rule(*named("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"))
def new(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> Tensor:
    """A size that the caller computes is global, so the tensor is replicated."""
    result: Tensor = func(input.local, *args, **kwargs)
    return result


@rule(*named("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"))
def dropout(func: Any, input: PatchTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Nothing in evaluation; in training the mask is the one of a single device, by the fallback."""
    if training and p > 0:
        return fallback(func, input, p, training, inplace)
    return pointwise(func, input, p, training, inplace)
