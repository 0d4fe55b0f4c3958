"""Largest and smallest values and where they are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.collectives import share_out, stack_ranks
from distpatch.lazy.row_patches import with_dummy_row
from distpatch.rules.core.operands import kept, needs_grad, normalize_dims, sum_ranks
from distpatch.rules.core.redistribution import held_places
from distpatch.rules.core.registry import beside_rows, named, rule
from distpatch.rules.elementwise.pointwise import pointwise
from distpatch.rules.reductions.reduction import Dims
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.op_names import op_name


def _some_rows(x: PatchTensor, largest: bool) -> Tensor:
    """The local rows; of an idle rank one that never wins."""
    if x.dtype.is_floating_point:
        worst: Any = -math.inf if largest else math.inf
    elif x.dtype == torch.bool:
        worst = not largest
    else:
        info = torch.iinfo(x.dtype)
        worst = info.min if largest else info.max
    return with_dummy_row(x.local, x.row_layout.dim, worst)


@rule(*named("amax", "amin"), any_order=True, asks_if_empty=True)
def extreme(func: Any, input: PatchTensor, dim: Dims = None, keepdim: bool = False) -> Any:
    """The gradient is shared equally by all elements, of all ranks, that have the value."""
    dims = normalize_dims(dim, input.ndim)
    if input.row_layout.dim not in dims:
        return kept(input, func(input.local, dims, keepdim), dims, keepdim)
    local, name = input.local, input.comm.name
    with torch.no_grad():
        rows = _some_rows(input, op_name(func) == "amax")
        value = func(stack_ranks(func(rows, dims, True), name, op_name(func)), 0)
    if needs_grad(local):
        winners = (local == value).detach()
        shares = winners.to(value.dtype) / sum_ranks(winners.sum(dims, True), input, func)
        value = share_out(local, shares, value, name)
    return value if keepdim else value.squeeze(dims)


@rule(*named("max", "min"), asks_if_empty=True, order_free=beside_rows)
def max_or_min(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Of all elements; of two tensors, element by element; or along a dim, with the place of the first."""
    if not args and not kwargs:
        return extreme(torch.amax if op_name(func) == "max" else torch.amin, input)
    several = len(args) > 1 or not kwargs.keys() <= {"other", "input"}  # with keepdim a tensor is the number of a dim
    if isinstance(args[0] if args else kwargs.get("other"), Tensor) and not several:
        return pointwise(func, input, *args, **kwargs)
    return _along(func, input, *args, **kwargs)


def _along(func: Any, input: PatchTensor, dim: int, keepdim: bool = False) -> Any:
    dims = normalize_dims(dim, input.ndim)
    if input.row_layout.dim not in dims:
        return kept(input, func(input.local, dim, keepdim), dims, keepdim)
    value, index = _first(input, op_name(func) == "max", dims[0])
    if needs_grad(input.local):
        value = picked(input, index, func)
    if not keepdim:
        value, index = value.squeeze(dims), index.squeeze(dims)
    return getattr(torch.return_types, op_name(func))((value, index))


@rule(*named("argmax", "argmin"), asks_if_empty=True, order_free=beside_rows)
def place(func: Any, input: PatchTensor, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        index = _first(input, op_name(func) == "argmax", None)[1]
        return index.view([1] * input.ndim) if keepdim else index
    dims = normalize_dims(dim, input.ndim)
    if input.row_layout.dim not in dims:
        return kept(input, func(input.local, dim, keepdim), dims, keepdim)
    index = _first(input, op_name(func) == "argmax", dims[0])[1]
    return index if keepdim else index.squeeze(dims)


@torch.no_grad()
def _first(x: PatchTensor, largest: bool, dim: int | None) -> tuple[Tensor, Tensor]:
    """The extreme value along the sharded dim (kept), or of all elements; and its first global index."""
    rows, row = _some_rows(x, largest), x.row_layout.dim
    lo = x.row_layout.bounds[x.rank]
    find = torch.max if largest else torch.min
    if dim is None:
        value, index = find(rows.reshape(-1), 0)
        inner = math.prod(x.shape[row + 1 :])
        in_front = index // (rows.shape[row] * inner)  # rows of dims before the sharded one
        index = index + (in_front * (x.row_layout.size - rows.shape[row]) + lo) * inner
    else:
        value, index = find(rows, row, keepdim=True)
        index = index + lo
    name, op = x.comm.name, "argmax" if largest else "argmin"
    values, indices = stack_ranks(value, name, op), stack_ranks(index, name, op)
    best = values.amax(0) if largest else values.amin(0)
    last = torch.iinfo(indices.dtype).max
    return best, torch.where((values == best) | values.isnan(), indices, last).amin(0)


def picked(x: PatchTensor, index: Tensor, func: Any) -> Tensor:
    """The elements at these global indices along the sharded dim, replicated: each is somebody's.

    An index out of range stays as it is, so that torch refuses it as it does on one device.
    """
    dim, rows = x.row_layout.dim, with_dummy_row(x.local, x.row_layout.dim)
    places, valid = held_places(x, index, -1), (index >= 0) & (index < x.row_layout.size)
    at = torch.where(valid, places.clamp(min=0), index)
    mine = rows.gather(dim, at).masked_fill(places < 0, 0)
    return sum_ranks(mine.byte(), x, func).bool() if x.dtype == torch.bool else sum_ranks(mine, x, func)
