"""Parts of a tensor: slices, chunks, single rows, sliding windows; each rank keeps its own of the chosen rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpatch.layout.rows import RowLayout
from distpatch.layout.stencil import ceil_div
from distpatch.rules.core.aliasing import copied
from distpatch.rules.core.registry import named, nth, rule, written
from distpatch.rules.core.wrapping import crop, part_of, wrap
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated


@rule(
    *named("chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"),
    *named("unsafe_split_with_sizes"),
    any_order=True,
    view=True,
)
def split(func: Any, input: PatchTensor, sizes: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    sizes = next(iter(kwargs.values()), sizes)  # chunks=, split_size=, sections=, indices=, ...
    sizes = gather_replicated(sizes) if isinstance(sizes, Tensor) else sizes
    at = nth(dim, input.ndim)
    if at != input.row_layout.dim:
        return tuple(wrap(part, input) for part in func(input.local, sizes, at))
    # torch cuts a tensor that has rows and no data, and every rank keeps its own rows of each part.
    counted = func(torch.empty(input.row_layout.size, device="meta"), sizes, 0)
    return tuple(crop(input, part.storage_offset(), part.storage_offset() + len(part)) for part in counted)


@rule(*named("unbind"), any_order=True, view=True)
def unbind(func: Any, input: PatchTensor, dim: int = 0) -> Any:
    at = nth(dim, input.ndim)
    if at == input.row_layout.dim:
        return NotImplemented
    layout = input.row_layout.with_dim(input.row_layout.dim - (at < input.row_layout.dim))
    return tuple(wrap(part, input, layout) for part in input.local.unbind(at))


@rule(*named("narrow"), any_order=True, view=True)
def narrow(func: Any, input: PatchTensor, dim: int, start: Any, length: int) -> PatchTensor:
    at = nth(dim, input.ndim)
    if at != input.row_layout.dim:
        return wrap(input.local.narrow(at, start, length), input)
    if isinstance(start, Tensor):  # known on the device alone
        return NotImplemented
    start = start + input.row_layout.size if start < 0 else start
    if not 0 <= start <= start + length <= input.row_layout.size:
        raise RuntimeError(f"start ({start}) + length ({length}) exceeds dimension size ({input.row_layout.size}).")
    return crop(input, start, start + length)


@rule(*named("select"), any_order=True, view=True)
def select(func: Any, input: PatchTensor, dim: int, index: int) -> Tensor:
    at = nth(dim, input.ndim)
    if at == input.row_layout.dim:
        return one_row(func, input, index)
    kept = input.row_layout.dim - (at < input.row_layout.dim)
    return wrap(input.local.select(at, index), input, input.row_layout.with_dim(kept))


def one_row(func: Any, x: PatchTensor, index: int) -> Tensor:
    """A single row is replicated: its owner sends it to all, and keeps what is written to it."""
    dim = x.row_layout.dim
    if not -x.row_layout.size <= index < x.row_layout.size:
        raise IndexError(f"index {index} is out of bounds for dimension {dim} with size {x.row_layout.size}")
    index %= x.row_layout.size
    row = crop(x, index, index + 1)
    value = gather_replicated(row).select(dim, 0)
    return copied(value, x, func, lambda: row.copy_(value.unsqueeze(dim)))


def slice_dim(x: Tensor, dim: int, item: slice) -> Tensor:
    """``x[..., item, ...]`` along one dim; each rank keeps its own of the chosen rows."""
    if item == slice(None):
        return x
    if not isinstance(x, PatchTensor):
        return x[(slice(None),) * dim + (item,)]
    if dim != x.row_layout.dim:
        return wrap(x.local[(slice(None),) * dim + (item,)], x)
    start, stop, step = item.indices(x.row_layout.size)
    x = crop(x, start, max(stop, start))
    if step == 1:
        return x
    rank, bounds = x.rank, tuple(ceil_div(b, step) for b in x.row_layout.bounds)
    first = bounds[rank] * step - x.row_layout.bounds[rank]
    local = x.local[(slice(None),) * dim + (slice(first, None, step),)]
    return part_of(x, local, RowLayout(dim, bounds), step)


@rule(*named("tril", "triu", "tril_", "triu_"))
def triangle(func: Any, input: PatchTensor, diagonal: int = 0) -> Any:
    """The diagonal is where it is in the whole matrix, of which the rank has some rows or columns."""
    if input.row_layout.dim >= input.ndim - 2:
        first = input.own_interval[0]
        diagonal += first if input.row_layout.dim == input.ndim - 2 else -first
    result = func(input.local, diagonal)
    return written(input) if result is input.local else wrap(result, input)
