"""How results stand in memory: as on one device, not as the kernel leaves them that computes one rank's rows.

Random numbers are drawn in the order in which a tensor stands in memory, and convolutions take their kernel by it.
Of one row or none, strides do not tell that order; and which kernel convolves, with which format, depends on how
many rows there are. In both cases torch is asked what it does with the whole tensor (torch_utils/memory_format.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.rules.core.aliasing import strides_of
from distpatch.rules.core.operands import needs_grad
from distpatch.rules.core.wrapping import dim_order
from distpatch.tensor.patch_tensor import PatchCopy, PatchTensor
from distpatch.tensor.row_copy import RowCopy
from distpatch.tensor.rule_table import RuleEntry
from distpatch.torch_utils.memory_format import (
    A_NUMBER,
    Kind,
    Strides,
    dense_strides,
    format_of,
    in_memory_order,
    order_by,
    order_in,
    same_order,
    strides_on_one_device,
)


def as_on_one_device(entry: RuleEntry, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """The results of a call, each put or noted in the order in which one device has it."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    if torch.compiler.is_compiling() or not all(isinstance(t, PatchTensor) for t in results):
        return result
    if 0 in results[0].shape:
        return result
    for x, strides in zip(results, _strides(entry, func, args, kwargs, results[0]) or ()):
        if x.ndim == len(strides) and not any(x is arg for arg in args):
            for each in (x, x.plain) if isinstance(x, PatchCopy) else (x,):
                _settle(each, strides)
    return result


def _strides(
    entry: RuleEntry, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: PatchTensor
) -> Sequence[Strides] | None:
    x, keeps_format = args[0] if args else None, entry.keeps_format  # not what torch says of tensors without data
    if isinstance(x, PatchTensor) and (keeps_format(*args, **kwargs) if callable(keeps_format) else keeps_format):
        return [dense_strides(result.shape, order_in(format_of(dim_order(x)), result.ndim))]
    if entry.promotes_numbers:  # on the meta device they are not tensors (seen in 2.13)
        args = tuple(A_NUMBER if isinstance(arg, (int, float)) else arg for arg in args)
    if entry.elementwise and all(_is_contiguous(t, result) for t in args if isinstance(t, Tensor)):
        return [dense_strides(result.shape, order_in(torch.contiguous_format, result.ndim))]
    by_device = entry.of_many_kernels or any(isinstance(arg, torch.device) for arg in (*args, *kwargs.values()))
    return strides_on_one_device(func, args, kwargs, _kind_of, by_device)


def _is_contiguous(tensor: Tensor, result: PatchTensor) -> bool:
    """Whether kernels see it so, which then ask no further; those of the meta device do (2.13)."""
    kind = _kind_of(tensor)
    if kind is None or tensor.shape != result.shape:
        return False
    return torch.empty_strided(tensor.shape, kind[1], device="meta").is_contiguous()


def _settle(x: PatchTensor, strides: Strides) -> None:
    if x.row_layout.is_tiny:
        x.strides = strides
        return
    order = order_by(x.shape, strides)
    if not same_order(dim_order(x), order, x.shape):
        format = format_of(order)
        if x.is_deferred:
            x.recipe.format = format
        else:
            is_format = order == order_in(format, x.ndim)
            x.local = x.local.contiguous(memory_format=format) if is_format else in_memory_order(x.local, order)


def _kind_of(tensor: Tensor) -> Kind | None:
    tensor = tensor.plain if isinstance(tensor, (PatchCopy, RowCopy)) else tensor
    local = tensor.local_or_recipe if isinstance(tensor, PatchTensor) else tensor
    local = local.plain if isinstance(local, (PatchCopy, RowCopy)) else local  # which stands as it did before a write
    if isinstance(local, Tensor) and (local.layout is not torch.strided or local.device.type == "meta"):
        return None
    strides = tuple(strides_of(tensor)) if isinstance(tensor, PatchTensor) else tensor.stride()
    return tensor.shape, strides, local.dtype, local.device, isinstance(local, Tensor) and needs_grad(local)
