"""What moves between the ranks of an axis whose rows are sharded themselves, over an inner one.

Each rank of the inner axis sends and receives its part of these rows: the same function, called on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from distpatch.comm import collectives
from distpatch.comm.communicator import communicator_of
from distpatch.comm.row_exchange import fetch_rows
from distpatch.comm.rows_around import fetch_around
from distpatch.layout.blocks import BlockLayout, InnerCut, cut_inside, layout_of
from distpatch.layout.rows import Bounds, Needs, RowLayout
from distpatch.layout.stencil import Interval
from distpatch.lazy.row_patches import with_dummy_row
from distpatch.rules.core.fallback import computed_on_all
from distpatch.rules.core.gather_records import record
from distpatch.rules.core.registry import rule
from distpatch.rules.core.wrapping import dim_order, part_of, reshard, wrap
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated, shard_in
from distpatch.torch_utils.memory_format import dense_strides, in_memory_order
from distpatch.torch_utils.tree import map_tensors, tensors_in


def _part(local: Tensor, x: PatchTensor, layout: RowLayout | None = None) -> PatchTensor:
    """What came of the rows of ``x``: in memory as these are on one device."""
    result = wrap(local, x, layout)
    if result.row_layout.is_tiny and result.ndim == x.ndim:
        result.strides = dense_strides(result.shape, dim_order(x))
    return result


def _note(name: str, op: str, x: PatchTensor) -> None:
    """All ranks of the outer axis must have the same rows over the inner one: else they are found out."""
    if name:
        communicator_of(name).sends_parts(op, x.row_layout)


@rule(fetch_rows, any_order=True)
def fetched(
    func: Any, local: PatchTensor, dim: int, bounds: Bounds, needs: Needs, name: str, op: str, channels_last: bool
) -> list[Tensor]:
    if local.row_layout.dim == dim:  # both axes share it out: this rank's part of an interval is no interval
        all_rows = all(interval == (0, bounds[-1]) for intervals in needs for interval in intervals)
        whole = gather_replicated(local) if all_rows else _whole(local, op)
        return func(whole, dim, bounds, needs, name, op, channels_last)
    _note(name, op, local)
    return [_part(piece, local) for piece in func(local.local, dim, bounds, needs, name, op, channels_last)]


@rule(fetch_around, any_order=True)
def fetched_around(
    func: Any, local: PatchTensor, strips: Sequence[Interval], dim: int, *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    _, _, name, op, _ = rest
    if local.row_layout.dim == dim:
        parts: tuple[Tensor, list[Tensor], list[Tensor]] = func(_whole(local, op), strips, dim, *rest)
        return parts
    _note(name, op, local)
    own, copied, edges = func(local.local, strips, dim, *rest)
    return wrap(own, local), [_part(t, local) for t in copied], [_part(t, local) for t in edges]


@rule(collectives.gather_in_order, any_order=True)
def gathered(
    func: Any, local: PatchTensor, layout: RowLayout, name: str, op: str, order: Sequence[int] | None = None
) -> Tensor:
    if local.row_layout.dim == layout.dim:
        return func(gather_replicated(local), layout, name, op, order)
    _note(name, op, local)
    return _part(func(local.local, layout, name, op, order), local)


@rule(collectives.shard_rows, any_order=True)
def sharded(func: Any, full: PatchTensor, layout: RowLayout, rank: int, name: str) -> Tensor:
    if full.row_layout.dim == layout.dim:
        return func(_whole(full, "shard"), layout, rank, name)
    return _part(func(full.local, layout, rank, name), full)


def _whole(x: PatchTensor, op: str) -> Tensor:
    record(op, [x])
    return gather_replicated(x)


@rule(collectives.narrow_inside, any_order=True, view=True)
def narrowed(func: Any, local: PatchTensor, dim: int, start: int, cuts: Sequence[InnerCut]) -> PatchTensor:
    layout = local.row_layout
    if layout.dim != dim:
        return wrap(collectives.narrow_inside(local.local, dim, start, cuts), local)
    taken = cut_inside(layout, start, cuts)
    heights = [sum(part.height(local.rank) for part in parts) for parts in taken]
    inside = [InnerCut(cut.part, cut.share, height) for cut, height in zip(cuts, heights)]
    own = collectives.narrow_inside(local.local, dim, layout.rows_before(start, local.rank), inside)
    return part_of(local, own, layout_of(dim, chain.from_iterable(taken)))


@rule(collectives.replicated_operand, collectives.sum_partials, any_order=True)
def of_rows(func: Any, x: PatchTensor, name: str, *args: Any) -> PatchTensor:
    _note(name, func.__name__, x)
    return _part(func(x.local, name, *args), x)


@rule(collectives.stack_ranks, any_order=True)
def stacked(func: Any, x: PatchTensor, name: str, op: str) -> PatchTensor:
    _note(name, op, x)
    return wrap(func(x.local, name, op), x, x.row_layout.with_dim(x.row_layout.dim + 1))


@rule(in_memory_order, any_order=True)
def ordered(func: Any, x: PatchTensor, order: Sequence[int]) -> PatchTensor:
    return _part(func(x.local, order), x)


def beside_no_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function on a rank of an outer axis that has no rows: torch's own result of none.

    Sharded over this axis as it is on the others: as a result of a dummy row says; where that has other rows, because
    there are none on any rank, as the argument where that says whose they would be, else evenly.
    """
    held = args[0].row_layout
    result = computed_on_all(func, args, kwargs)
    with torch.no_grad():
        like = func(*map_tensors(_not_empty, args), **map_tensors(_not_empty, kwargs))
    layouts = iter([t.row_layout if isinstance(t, PatchTensor) else None for t in tensors_in(like)])

    def sharded(tensor: Tensor) -> Tensor:
        layout, full = next(layouts), gather_replicated(tensor)
        if layout is None:
            return full
        if isinstance(held, BlockLayout) and full.shape[layout.dim] == 0:
            return wrap(full, args[0], held.with_dim(layout.dim))
        if layout.size != full.shape[layout.dim]:
            return reshard(args[0], full, layout.dim)
        return shard_in(args[0].region, full, layout)

    return map_tensors(sharded, result)


def _not_empty(tensor: Tensor) -> Tensor:
    for dim in range(tensor.ndim):
        tensor = with_dummy_row(tensor, dim)
    return tensor
