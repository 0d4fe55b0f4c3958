"""Sharded tensors made of a rank's rows: wrapped, cropped, in memory as others are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.collectives import narrow_inside
from distpatch.layout.blocks import InnerCut, layout_of
from distpatch.layout.rows import RowLayout
from distpatch.lazy.recipe import Recipe
from distpatch.lazy.row_patches import none_of, same_memory, with_dummy_row
from distpatch.tensor.patch_tensor import BlockTensor, PatchTensor, shard_in
from distpatch.torch_utils import memory_format
from distpatch.torch_utils.memory_format import Order, Strides
from distpatch.torch_utils.tree import map_tensors


def wrap(local: Tensor | Recipe, like: PatchTensor, layout: RowLayout | None = None) -> PatchTensor:
    """A PatchTensor of the same region; of the same layout where none is given."""
    result = PatchTensor(local, layout or like.row_layout, like.region)
    if like.row_stride and isinstance(local, Tensor) and same_memory(local, like.local):
        result.row_stride = like.row_stride
    return result


def crop(x: PatchTensor, lo: int, hi: int) -> PatchTensor:
    """Rows [lo, hi) of the whole tensor, a view: each rank keeps those of its own."""
    rows = x.row_layout
    cuts = rows.cuts(lo, hi)
    inside = [InnerCut(cut.part, cut.share, cut.rows.height(x.rank)) for cut in cuts]
    local = narrow_inside(x.local, rows.dim, rows.rows_before(lo, x.rank), inside)
    return part_of(x, local, layout_of(rows.dim, (cut.rows for cut in cuts)))


def part_of(x: PatchTensor, local: Tensor, layout: RowLayout, step: int = 1) -> PatchTensor:
    """A view of some of the rows, every ``step``-th one."""
    result = wrap(local, x, layout)
    if layout.size != x.row_layout.size and not torch.compiler.is_compiling():
        result.row_stride = max(x.row_stride, 1) * step
    return result


def dim_order(x: PatchTensor) -> Order:
    """The order of its dims in memory, innermost first; without materialising deferred rows."""
    if x.strides is not None:
        return memory_format.order_by(x.shape, x.strides)
    return memory_format.order_in(x.recipe.format, x.ndim) if x.is_deferred else memory_format.memory_order(x.local)


def dense_strides_of(x: PatchTensor) -> Strides:
    """Those that it has on one device, dense in the memory order of the local rows."""
    return memory_format.dense_strides(x.shape, dim_order(x)) if x.strides is None else x.strides


def in_memory_of(local: Tensor, x: PatchTensor, layout: RowLayout | None = None) -> PatchTensor:
    """Rows that came from elsewhere, in memory as those of ``x``."""
    result = wrap(memory_format.in_memory_order(local, dim_order(x)), x, layout)
    if result.row_layout.is_tiny and not torch.compiler.is_compiling():
        result.strides = dense_strides_of(x)
    return result


def reshard(region_of: PatchTensor, tensor: Tensor, dim: int) -> PatchTensor:
    """A replicated tensor, sharded along ``dim``: a slice."""
    layout = RowLayout(dim, region_of.region.bounds(tensor.shape[dim]))
    return shard_in(region_of.region, tensor, layout)


def on_some_rows(
    fn: Callable[[Tensor], Any], rows: Tensor, dim: int, least: int = 1, out_dim: int | None = None
) -> Any:
    """``fn(rows)``, one tensor or several; where there are none, of ``least`` blank rows, and none is kept.

    ``out_dim``: that of the result's rows, if another.
    """
    if rows.shape[dim] > 0:
        return fn(rows)
    return no_rows(fn(with_dummy_row(rows, dim, count=least)), rows, dim if out_dim is None else out_dim)


def no_rows(result: Any, of: Tensor, dim: int) -> Any:
    """No rows of what became of dummy rows of ``of``, which has none itself.

    Where these are of an inner axis, what is known of who would have which is known of the result too.
    """
    none = none_of(result, dim)
    return map_tensors(lambda t: _in_layouts_of(of, t, dim), none) if isinstance(of, PatchTensor) else none


def _in_layouts_of(rows: Tensor, none: Tensor, dim: int) -> Tensor:
    if not (isinstance(rows, PatchTensor) and isinstance(none, PatchTensor)):
        return none
    counted = isinstance(rows, BlockTensor) and none.row_layout.dim == dim
    return wrap(_in_layouts_of(rows.local, none.local, dim), none, rows.row_layout.with_dim(dim) if counted else None)


def beside_rows(func: Any, x: PatchTensor, *args: Any, **kwargs: Any) -> PatchTensor:
    """A function that computes each row by itself, of this rank's rows."""
    return wrap(on_some_rows(lambda rows: func(rows, *args, **kwargs), x.local, x.row_layout.dim), x)
