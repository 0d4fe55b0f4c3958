"""Rows that move: to other ranks, along another dim, in order, all of them to everybody."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distpatch.comm import collectives
from distpatch.comm.row_exchange import fetch_rows
from distpatch.layout.blocks import BlockLayout
from distpatch.layout.rows import Needs, RowLayout
from distpatch.layout.transfers import needs_in_order, needs_in_parts
from distpatch.rules.core.gather_records import record
from distpatch.rules.core.wrapping import in_memory_of, reshard, wrap
from distpatch.tensor.axes import InnerTensor, bare
from distpatch.tensor.patch_tensor import BlockTensor, PatchCopy, PatchTensor, gather_replicated
from distpatch.torch_utils.op_names import op_name

MOST_PIECES = 1024  # more intervals of rows a rank than this are not worth an exchange of their own


def fetch(x: PatchTensor, needs: Needs, func: Any) -> list[Tensor]:
    """The intervals of global rows that each rank needs; gradients return and are added."""
    if isinstance(x.row_layout, BlockLayout) and x.region.level:
        return [_inner_whole(x, func).narrow(x.row_layout.dim, lo, hi - lo) for lo, hi in needs[x.rank]]
    if type(x) is not PatchTensor:
        x = in_order(x)
    rows, name = x.row_layout, x.comm.name
    return fetch_rows(x.local, rows.dim, rows.bounds, needs, name, op_name(func), False)


def unmerge_blocks(x: PatchTensor) -> PatchTensor:
    """A ``BlockTensor`` with the dim of its blocks in front of its rows again, a view; others as they are."""
    layout = x.row_layout
    if not isinstance(layout, BlockLayout) or layout.is_joined or layout.blocks == 1:
        return x
    rows = layout.opened
    return wrap(x.local.unflatten(layout.dim, (layout.blocks, rows.height(x.rank))), x, rows)


def parts_of(x: PatchTensor) -> list[PatchTensor]:
    """The tensors whose rows were joined in this one, views; one that is not joined by itself."""
    layout = x.row_layout
    if not isinstance(layout, BlockLayout) or not layout.is_joined:
        return [x]
    return [wrap(rows, x, piece) for rows, piece in collectives.cut_rows(x.local, layout, x.rank)]


def held_places(x: PatchTensor, numbers: Tensor, others: int) -> Tensor:
    """Where this rank holds the rows of these global numbers; ``others`` for those that it does not have."""
    places, first, held = torch.full_like(numbers, others), 0, 0
    for part in x.row_layout.parts:
        rows, lo, hi = part.inner[-1], part.inner[x.rank], part.inner[x.rank + 1]
        if part.size and part.block_count == 1:
            places = torch.where(
                (numbers >= first + lo) & (numbers < first + hi), numbers + (held - first - lo), places
            )
        elif part.size:
            block, row = (numbers - first).div(rows, rounding_mode="floor"), (numbers - first) % rows
            own = (numbers >= first) & (numbers < first + part.size) & (row >= lo) & (row < hi)
            places = torch.where(own, held + block * (hi - lo) + row - lo, places)
        first, held = first + part.size, held + part.height(x.rank)
    return places


def in_order(tensor: Any) -> Any:
    """A ``BlockTensor`` with its rows in order; any other tensor as it is.

    Those of an inner axis are gathered: what is merged with them may be the rows of the axis outside it, so that its
    ranks, which have other numbers of these, would share them out in other ways.
    """
    if isinstance(tensor, PatchCopy):
        tensor = tensor.plain
    if not isinstance(tensor, BlockTensor):
        return tensor
    layout, comm = tensor.row_layout, tensor.comm
    bounds = tensor.region.bounds(layout.size)
    if not layout.size:
        return wrap(tensor.local, tensor, RowLayout(layout.dim, bounds))
    if tensor.region.level:
        record("reshape", [tensor])
        return gather_replicated(tensor)
    needs = needs_in_order(layout, bounds)
    if len(needs[0]) > MOST_PIECES:
        record("reshape", [tensor])
        return reshard(tensor, gather_replicated(tensor), layout.dim)
    pieces = fetch_rows(tensor.local, layout.dim, layout.held, needs, comm.name, "reshape", False)
    return PatchTensor(torch.cat(pieces, layout.dim), RowLayout(layout.dim, bounds), tensor.region)


def _inner_whole(x: PatchTensor, func: Any) -> Tensor:
    """Blocks of an inner axis, which are gathered where they must be in order (``in_order``)."""
    record("reshape", [x])
    return gather_partial(x, func)


def gather_partial(x: PatchTensor, func: Any) -> Tensor:
    """All rows in order, as an operand of this rank's rows: gradients are partial, and are summed at the owners."""
    if not x.row_layout.size:
        return x.local
    if isinstance(x.row_layout, BlockLayout):
        if x.row_layout.is_joined:
            return collectives.join_rows([gather_partial(part, func) for part in parts_of(x)], x.row_layout.dim)
        return gather_partial(unmerge_blocks(x), func).flatten(x.row_layout.dim, x.row_layout.dim + 1)
    return fetch(x, (((0, x.row_layout.size),),) * x.row_layout.world_size, func)[0]


def redistribute(x: PatchTensor, layout: RowLayout, func: Any) -> PatchTensor:
    """The same tensor in other rows, or sharded along another dim; one exchange either way."""
    held = x.row_layout
    if layout == held:
        return x
    if layout.size == held.size == 0 and layout.dim == held.dim:
        return wrap(x.local, x, layout)
    if isinstance(held, BlockLayout) and isinstance(layout, BlockLayout) and _are_blocks_alike(held, layout):
        if layout.is_joined:
            moved = [redistribute(t, new, func).local for t, new in zip(parts_of(x), layout.pieces)]
            return wrap(collectives.join_rows(moved, layout.dim), x, layout)
        rows = redistribute(unmerge_blocks(x), layout.opened, func).local  # others of each block
        return in_memory_of(rows.flatten(layout.dim, layout.dim + 1), x, layout)
    if layout.dim != held.dim:
        if type(layout) is RowLayout:
            return _turn_parts(x, layout, func)
        even = RowLayout(layout.dim, x.region.bounds(layout.size))
        return redistribute(_turn_parts(x, even, func), layout, func)
    if isinstance(held, BlockLayout) and x.region.level:
        return in_memory_of(collectives.narrow_rows(_inner_whole(x, func), layout, x.rank), x, layout)
    x = in_order(x)
    if isinstance(layout, BlockLayout):
        return in_memory_of(_in_blocks(x, layout, func), x, layout)
    needs = tuple((layout.interval(rank),) for rank in range(layout.world_size))
    return in_memory_of(fetch(x, needs, func)[0], x, layout)


def widest_beside(x: PatchTensor, along: Collection[int]) -> int | None:
    """The widest dim that is none of these, and is not sharded over an inner axis: one to turn to. None if all are."""
    taken = {*along, *inner_dims(x)}
    return max((dim for dim in range(x.ndim) if dim not in taken), key=lambda dim: x.shape[dim], default=None)


def turned(x: PatchTensor, dim: int, func: Any) -> PatchTensor:
    """Sharded evenly along another dim: every rank sends every other its slice of it."""
    return redistribute(x, RowLayout(dim, x.region.bounds(x.shape[dim])), func)


def alike_inside(tensors: Sequence[Tensor], func: Any) -> list[Tensor]:
    """Tensors of which each rank will have other rows: where these are sharded over inner axes, all in one way."""
    inside = [t.local if isinstance(t, PatchTensor) else bare(t) for t in tensors]
    lead = next((rows for rows in inside if isinstance(rows, PatchTensor)), None)
    if lead is None:
        return list(tensors)
    rows = lead.row_layout
    moved = [
        redistribute(t, rows, func) if isinstance(t, PatchTensor) and t.shape[rows.dim] == rows.size else t
        for t in inside
    ]
    moved = alike_inside(moved, func)
    return [
        t if new is old else wrap(new, t) if isinstance(t, PatchTensor) else InnerTensor(new)  # type: ignore[arg-type]
        for t, old, new in zip(tensors, inside, moved)
    ]


def _in_blocks(x: PatchTensor, layout: BlockLayout, func: Any) -> Tensor:
    """This rank's rows of each block."""
    needs = needs_in_parts(layout)
    if len(needs[0]) > MOST_PIECES:
        return collectives.narrow_rows(gather_partial(x, func), layout, x.rank)
    return collectives.join_rows(fetch(x, needs, func), layout.dim)


def _are_blocks_alike(one: BlockLayout, other: BlockLayout) -> bool:
    """Whether rows are in the same parts and blocks, if on other ranks."""
    parts = [[(part.inner[-1], part.block_count) for part in layout.parts] for layout in (one, other)]
    return one.dim == other.dim and parts[0] == parts[1]


def _turn_parts(x: PatchTensor, layout: RowLayout, func: Any) -> PatchTensor:
    """Sharded along another dim; blocks of rows are a dim of their own meanwhile, and need not be in order."""
    old = x.row_layout.dim
    if not isinstance(x.row_layout, BlockLayout):
        return _turn(x, layout, func)
    pieces = []
    for part in parts_of(x):
        opened = unmerge_blocks(part)
        more = opened.ndim - part.ndim
        target = layout.with_dim(layout.dim + (more if layout.dim > old else 0))
        whole = part.row_layout.size > 0
        rows = _turn(opened, target, func).local if whole else collectives.narrow_rows(opened.local, target, x.rank)
        pieces.append(rows.flatten(old, old + more))
    return in_memory_of(collectives.join_rows(pieces, old), x, layout)


def _turn(x: PatchTensor, layout: RowLayout, func: Any) -> PatchTensor:
    """Every rank sends every other its slice of the new dim, in its own rows of the old one."""
    old, new, name = x.row_layout.dim, layout.dim, x.comm.name
    heights = [hi - lo for lo, hi in pairwise(x.row_layout.bounds)]
    held = tuple(layout.size * b for b in x.row_layout.bounds)
    needs = tuple(
        tuple((first + lo * height, first + hi * height) for first, height in zip(held, heights))
        for lo, hi in pairwise(layout.bounds)
    )
    wire = x.local.movedim((new, old), (0, 1)).flatten(0, 1)
    pieces = fetch_rows(wire, 0, held, needs, name, op_name(func), False)
    lo, hi = layout.interval(x.rank)
    parts = [piece.reshape(hi - lo, height, *wire.shape[1:]) for piece, height in zip(pieces, heights)]
    local = torch.cat(parts, 1).movedim((0, 1), (new, old))
    return in_memory_of(local, x, layout)


def along_rows(x: PatchTensor, func: Any) -> PatchTensor:
    """Where it is sharded along its channels (a reshape has made them of rows): along rows again, if it has any."""
    if x.row_layout.dim != 1 or x.ndim < 3:
        return x
    free = [d for d in range(2, x.ndim) if d not in inner_dims(x)]
    dim = x.region.options.dim  # that this axis shares out where nothing has moved
    own = max(2, x.ndim + dim) if isinstance(dim, int) and dim < 0 else max(2, x.ndim - 2)
    dim = own if own in free else max(free, key=lambda d: x.shape[d], default=own)
    return redistribute(x, RowLayout(dim, x.region.bounds(x.shape[dim])), func)


def inner_dims(x: PatchTensor) -> set[int]:
    """The dims that are sharded over inner axes."""
    taken, inside = set(), x.local
    while isinstance(inside, PatchTensor):
        taken.add(inside.row_layout.dim)
        inside = inside.local
    return taken
