"""In place: what a function's own rule computes is written to the rows; dims change in place too.

A function without any rule is gathered, and what it wrote is written back (fallback.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.rules.core.operands import needs_grad
from distpatch.rules.core.out_argument import check_stored
from distpatch.rules.core.registry import named
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.tensor.rule_table import RULES, RuleEntry
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import tensors_in

_MOVING_DIMS = frozenset("unsqueeze_ squeeze_ transpose_ t_ swapaxes_ swapdims_".split())


def _written(plain: Callable[..., Any], func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The result of the out-of-place function, copied into the rows. Its backward may need what stood there."""
    if not isinstance(input, PatchTensor):
        return NotImplemented
    keeps = needs_grad(input, *tensors_in((args, kwargs)))
    result = plain(input.clone() if keeps else input, *args, **kwargs)
    check_stored(func, input, result)
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


def fill_in() -> None:
    """A rule for every method that writes in place and has none, where its out-of-place form has one."""
    for name in dir(Tensor):
        method = getattr(Tensor, name)
        if name.startswith("_") or not name.endswith("_") or method in RULES:
            continue
        plain = next((function for function in named(name[:-1]) if RULES.has_rule(function)), None)
        if plain is not None:
            moves = name in _MOVING_DIMS
            RULES[method] = RuleEntry(partial(_moved if moves else _written, plain), moves_dims=moves)
