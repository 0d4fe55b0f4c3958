"""``out=``: what the rule computes is copied to where it is wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.rules.core.fresh_buffers import shard_like
from distpatch.rules.core.gather_records import record
from distpatch.rules.core.operands import needs_grad
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import tensors_in


def into(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call with ``out=``: what the rule computes is copied to where it is wanted."""
    out, given = kwargs["out"], {key: value for key, value in kwargs.items() if key != "out"}
    if needs_grad(*tensors_in((args, kwargs))):
        raise RuntimeError(
            f"{op_name(func)}(): functions with out=... arguments don't support automatic differentiation, but one of "
            "the arguments requires grad."
        )
    results = func(*args, **given)
    for target, result in zip(tensors_in(out), tensors_in(results), strict=True):
        _store(func, target, result)
    return out


def _store(func: Any, target: Tensor, result: Tensor) -> None:
    """Copied to ``target``, which gets its shape, as torch does it, if it is a plain tensor, or becomes sharded."""
    if isinstance(result, PatchTensor) and target.shape == result.shape and type(target) is Tensor:
        shard_like(target, result)
    if isinstance(target, PatchTensor):
        check_stored(func, target, result)
    elif isinstance(result, PatchTensor):
        record(op_name(func), [result])
        result = gather_replicated(result)
    if target.shape != result.shape:
        target.resize_(result.shape)
    target.copy_(result)


def check_stored(func: Any, target: PatchTensor, result: Tensor) -> None:
    """Raise where a result cannot be written to the rows of ``target``."""
    if not torch.can_cast(result.dtype, target.dtype):
        raise RuntimeError(
            f"{op_name(func)}: result type {result.dtype} can't be cast to the desired output type {target.dtype}"
        )
    if target.shape != result.shape:
        raise UnsupportedOpError(
            f"{op_name(func)}: a result of shape {tuple(result.shape)} cannot be written to {target!r}, which keeps "
            "its shape"
        )
