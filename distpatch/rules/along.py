"""Functions that work along one dim: local unless it is the sharded one."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from distpatch.rules.fallback import fallback
from distpatch.rules.registry import named, rule, spread, wrap
from distpatch.tensor import PatchTensor
from distpatch.tree import map_tensors


@rule(*named("softmax", "log_softmax", "softmin", "cumsum", "cumprod", "glu", "logcumsumexp"))
def along(func: Any, input: PatchTensor, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    if dim is None or dim % input.ndim == input.rows.dim:
        return fallback(func, input, dim, *args, **kwargs)
    return map_tensors(lambda t: wrap(t, input), func(input.local, dim, *args, **kwargs))


@rule(F.normalize)
def normalize(func: Any, input: PatchTensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
    if dim % input.ndim == input.rows.dim or out is not None:
        return fallback(func, input, p, dim, eps, out)
    return wrap(func(input.local, p, dim, eps), input)


@rule(F.layer_norm, F.rms_norm)
def norm_of_last_dims(
    func: Any,
    input: PatchTensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if input.rows.dim >= input.ndim - len(normalized_shape):
        return fallback(func, input, normalized_shape, weight, *args, **kwargs)
    weight, args, kwargs = map_tensors(lambda t: spread(t, input), (weight, args, kwargs))
    return wrap(func(input.local, normalized_shape, weight, *args, **kwargs), input)
