"""In place, and with ``out=``: what a function's own rule computes is written to the rows; dims change in place too.

A function without any rule is gathered, and what it wrote is written back (fallback.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.rules.core.aliasing import MOVES_DIMS
from distpatch.rules.core.fallback import fallback, record
from distpatch.rules.core.fresh_buffers import shard_like
from distpatch.rules.core.operands import needs_grad
from distpatch.rules.core.registry import named
from distpatch.rules.elementwise.pointwise import pointwise
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.tensor.rule_table import RULES
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import tensors_in


def _written(plain: Callable[..., Any], func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The result of the out-of-place function, copied into the rows. Its backward may need what stood there."""
    if not isinstance(input, PatchTensor):
        return fallback(func, input, *args, **kwargs)
    keeps = needs_grad(input, *tensors_in((args, kwargs)))
    result = plain(input.clone() if keeps else input, *args, **kwargs)
    _check(func, input, result)
    return input.copy_(result)


def _moved(plain: Callable[..., Any], func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> PatchTensor:
    """The same tensor with its dims in other places: it takes on the rows and the layout of the view."""
    if input.local.requires_grad and input.local.is_leaf and torch.is_grad_enabled():
        raise RuntimeError(
            f"{op_name(func)}: a leaf Variable that requires grad is being used in an in-place operation."
        )
    result = plain(input, *args, **kwargs)
    if type(result) is not type(input):
        raise UnsupportedOpError(
            f"{op_name(func)} would make {input!r} a tensor that is not sharded any more. Use its out-of-place form."
        )
    input.local, input.row_layout, input._shape = result.local, result.row_layout, result._shape
    input.row_stride, input.strides = result.row_stride, result.strides
    return input


def into(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call with ``out=``: what the rule computes is copied to where it is wanted."""
    out, rule = kwargs["out"], RULES[func]
    given = {key: value for key, value in kwargs.items() if key != "out"}
    if out is None or rule in {pointwise, RULES.fallback}:
        return rule(func, *args, **(given if out is None else kwargs))
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
        _check(func, target, result)
    elif isinstance(result, PatchTensor):
        record(op_name(func), [result])
        result = gather_replicated(result)
    if target.shape != result.shape:
        target.resize_(result.shape)
    target.copy_(result)


def _check(func: Any, target: PatchTensor, result: Tensor) -> None:
    if not torch.can_cast(result.dtype, target.dtype):
        raise RuntimeError(
            f"{op_name(func)}: result type {result.dtype} can't be cast to the desired output type {target.dtype}"
        )
    if target.shape != result.shape:
        raise UnsupportedOpError(
            f"{op_name(func)}: a result of shape {tuple(result.shape)} cannot be written to {target!r}, which keeps "
            "its shape"
        )


def _by(way: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def rule(func: Any, *args: Any, **kwargs: Any) -> Any:
        return way(plain, func, *args, **kwargs)

    return rule


def fill_in() -> None:
    """A rule for every method that writes in place and has none, where its out-of-place form has one."""
    for name in dir(Tensor):
        method = getattr(Tensor, name)
        if name.startswith("_") or not name.endswith("_") or method in RULES:
            continue
        plain = next((function for function in named(name[:-1]) if function in RULES), None)
        if plain is not None:
            RULES[method] = _by(_moved if method in MOVES_DIMS else _written, plain)


RULES.into = into
