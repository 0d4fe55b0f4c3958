"""Dims in another order, added or dropped: the rows stay where they are, the layout says which dim they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.layout.rows import RowLayout
from distpatch.rules.core.aliasing import copied
from distpatch.rules.core.operands import normalize_dims, sizes_of
from distpatch.rules.core.registry import named, nth, rule
from distpatch.rules.core.wrapping import wrap
from distpatch.rules.shapes.concatenation import assembled
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated


def _moved(x: PatchTensor, local: Tensor, order: Sequence[int]) -> PatchTensor:
    """``order[i]``: the old dim that is now dim i."""
    place = list(order).index
    return wrap(local, x, x.row_layout.with_dim(place(x.row_layout.dim)))


@rule(*named("permute"), any_order=True, view=True)
def permute(func: Any, input: PatchTensor, *dims: Any, **kwargs: Any) -> PatchTensor:
    order = [nth(d, input.ndim) for d in sizes_of(dims, kwargs, "dims")]
    return _moved(input, input.local.permute(order), order)


@rule(*named("transpose", "swapaxes", "swapdims"), any_order=True, view=True)
def transpose(func: Any, input: PatchTensor, *dims: int, **kwargs: int) -> PatchTensor:
    order = list(range(input.ndim))
    one, other = *dims, *kwargs.values()  # dim0 and dim1, or axis0 and axis1
    order[one], order[other] = order[other], order[one]
    return _moved(input, input.local.transpose(one, other), order)


@rule(*named("movedim", "moveaxis"), any_order=True, view=True)
def movedim(func: Any, input: PatchTensor, source: Any, destination: Any) -> PatchTensor:
    sources = normalize_dims(source, input.ndim)
    targets = normalize_dims(destination, input.ndim)
    rest = iter(d for d in range(input.ndim) if d not in sources)
    placed = dict(zip(targets, sources, strict=True))
    order = [placed[d] if d in placed else next(rest) for d in range(input.ndim)]
    return _moved(input, input.local.permute(order), order)


@rule(
    *named("t", "adjoint"),
    *(getattr(torch.Tensor, n).__get__ for n in ("T", "mT", "H", "mH")),
    any_order=True,
    view=True,
)
def turn(func: Any, input: PatchTensor) -> PatchTensor:
    reverse = getattr(func, "__self__", None) is torch.Tensor.T  # of more than two dims, all in reverse
    order = list(range(input.ndim))
    if input.ndim > 1:
        order = order[::-1] if reverse else [*order[:-2], order[-1], order[-2]]
    return _moved(input, func(input.local), order)


@rule(*named("unsqueeze"), any_order=True, view=True)
def unsqueeze(func: Any, input: PatchTensor, dim: int) -> PatchTensor:
    at = nth(dim, input.ndim + 1)
    rows = input.row_layout.with_dim(input.row_layout.dim + (at <= input.row_layout.dim))
    return wrap(input.local.unsqueeze(at), input, rows)


@rule(*named("squeeze"), any_order=True, view=True)
def squeeze(func: Any, input: PatchTensor, dim: Any = None) -> Tensor:
    dims = (
        []
        if isinstance(dim, tuple) and not dim
        else [d for d in normalize_dims(dim, input.ndim) if input.shape[d] == 1]
    )
    if input.row_layout.dim in dims:  # a tensor of one row is somebody's, and everybody's once it is no row
        value = gather_replicated(input).squeeze(tuple(dims))
        return copied(value, input, func, lambda: input.copy_(value.reshape(input.shape)))
    kept = input.row_layout.dim - sum(d < input.row_layout.dim for d in dims)
    return wrap(input.local.squeeze(tuple(dims)), input, input.row_layout.with_dim(kept))


@rule(*named("expand", "broadcast_to"), any_order=True, view=True)
def expand(func: Any, input: PatchTensor, *shape: Any, **kwargs: Any) -> Tensor:
    sizes = list(sizes_of(shape, kwargs, "size"))
    dim = len(sizes) - input.ndim + input.row_layout.dim
    if sizes[dim] in (-1, input.row_layout.size):
        sizes[dim] = -1
        return wrap(input.local.expand(sizes), input, input.row_layout.with_dim(dim))
    if input.row_layout.size != 1:
        raise RuntimeError(f"a tensor of shape {tuple(input.shape)} cannot be expanded to {sizes}")
    bounds = input.region.bounds(sizes[dim])  # everybody's, and each rank keeps some
    lo, hi = bounds[input.rank : input.rank + 2]
    row = assembled(func, [input], [(0, 0, 1)] * (len(bounds) - 1), tuple(range(len(bounds))))
    sizes[dim] = hi - lo
    return wrap(row.local.expand(sizes), input, RowLayout(dim, bounds))


def _beside_pairs(input: PatchTensor) -> bool:
    """Whether rows are another dim than the last."""
    return input.row_layout.dim < input.ndim - 1


@rule(*named("view_as_real", "view_as_complex"), any_order=_beside_pairs, view=True)
def complex_view(func: Any, input: PatchTensor) -> Any:
    """The last dim of two numbers that a complex one has comes or goes."""
    if func is torch.view_as_complex and input.row_layout.dim == input.ndim - 1:
        return NotImplemented
    return wrap(func(input.local), input)
