"""Which intervals of rows each rank reads, sends and receives: frozen plans, cached."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from distpatch.layout.blocks import BlockLayout
from distpatch.layout.rows import EMPTY, Bounds, Needs, RowLayout, Stencil
from distpatch.layout.stencil import Interval, WindowStencil, ceil_div


@dataclass(frozen=True)
class StencilPlan:
    """What one operation asks of every rank.

    ``out``: bounds of the output; ``needs[rank]``: the intervals of halo rows above and below the rank's own.
    """

    out: Bounds
    needs: Needs


@lru_cache(maxsize=4096)
def plan_stencil(bounds: Bounds, stencil: Stencil) -> StencilPlan:
    """Output bounds of a stencil, and the halo rows that each rank needs for its output rows."""
    rows, rows_out = bounds[-1], stencil.out_rows(bounds[-1])
    inner = (min(max(stencil.first_out(b), 0), rows_out) for b in bounds[1:-1])
    out = (0, *inner, rows_out)
    needs = []
    for rank, (lo, hi) in enumerate(pairwise(out)):
        if lo == hi:
            needs.append((EMPTY, EMPTY))
            continue
        start, stop = stencil.need(lo, hi)
        start, stop = min(max(start, 0), rows), min(max(stop, 0), rows)
        own_start, own_stop = bounds[rank], bounds[rank + 1]
        above = (start, min(stop, own_start)) if start < min(stop, own_start) else EMPTY
        below = (max(start, own_stop), stop) if max(start, own_stop) < stop else EMPTY
        needs.append((above, below))
    return StencilPlan(out, tuple(needs))


@dataclass(frozen=True)
class RankPlan:
    """One rank's share of a ``StencilPlan``.

    ``layout``: of the output; ``moves``: whether any rank needs rows of another; ``own``: the rank's input rows;
    ``rows``: its rows of the output, made of the rows ``read``; an idle rank has one to compute on. ``seams``: of the
    output rows that are wrong when it takes its own rows for the image, padded as the image is, (start, stop, the rows
    that they read); None where these are most, or that cannot be done.
    """

    layout: RowLayout
    needs: Needs
    moves: bool
    own: Interval
    rows: Interval
    read: Interval
    seams: tuple[tuple[int, int, Interval], ...] | None


@lru_cache(maxsize=4096)
def plan_rank(layout: RowLayout, stencil: Stencil, rank: int) -> RankPlan:
    plan = plan_stencil(layout.bounds, stencil)
    lo, hi = plan.out[rank], plan.out[rank + 1]
    seams = _seams(stencil, layout, rank, lo, hi) if isinstance(stencil, WindowStencil) else None
    read = stencil.need(lo, hi) if lo < hi else stencil.need(0, 1)
    moves = any(interval != EMPTY for intervals in plan.needs for interval in intervals)
    own = layout.interval(rank)
    return RankPlan(layout.with_bounds(plan.out), plan.needs, moves, own, (lo, hi), read, seams)


def _seams(
    stencil: WindowStencil, layout: RowLayout, rank: int, lo: int, hi: int
) -> tuple[tuple[int, int, Interval], ...] | None:
    (start, stop), pad, step = layout.interval(rank), stencil.before, stencil.stride
    fits = pad == stencil.after and lo * step == start < stop and stop - start + 2 * pad >= stencil.span
    fits = fits and stop - start >= stencil.dilation  # no window has only padding: the index of a maximum would be none
    if not fits or stencil.out_rows(stop - start) != hi - lo:
        return None
    top = min(ceil_div(start + pad, step), hi) if start > 0 else lo
    bottom = max((stop + pad - stencil.span) // step + 1, top) if stop < layout.size else hi
    if bottom - top < (hi - lo) // 2:
        return None
    return tuple((a, b, stencil.need(a, b)) for a, b in ((lo, top), (bottom, hi)) if a < b)


def padded(needs: Sequence[Sequence[Interval]]) -> Needs:
    """The same number of intervals for every rank, as an exchange requires; empty ones are added."""
    count = max(1, *(len(intervals) for intervals in needs))
    return tuple((*intervals, *[EMPTY] * (count - len(intervals))) for intervals in needs)


@lru_cache(maxsize=4096)
def needs_in_order(layout: BlockLayout, bounds: Bounds) -> Needs:
    """What each rank needs of a ``BlockLayout`` to own its rows ``bounds[rank]:bounds[rank + 1]`` in order.

    The intervals count the rows as they are held: rank by rank, and on each rank part by part.
    """
    pieces = []
    for rank in range(layout.world_size):
        held = layout.held[rank]
        for lo, hi in layout.intervals(rank):
            pieces.append((lo, hi, held - lo))
            held += hi - lo
    pieces.sort()
    starts = [lo for lo, _, _ in pieces]
    needs = []
    for lo, hi in pairwise(bounds):
        own = pieces[max(bisect_right(starts, lo) - 1, 0) : bisect_left(starts, hi)]
        cut = [(max(lo, a) + held, min(hi, b) + held) for a, b, held in own]
        needs.append([(a, b) for a, b in cut if a < b])
    return padded(needs)


@lru_cache(maxsize=4096)
def needs_in_parts(layout: BlockLayout) -> Needs:
    """What each rank needs of rows in order to own its rows of a ``BlockLayout``, as it holds them."""
    return padded([list(layout.intervals(rank)) for rank in range(layout.world_size)])


@dataclass(frozen=True)
class EdgePlan:
    """An exchange of halo rows alone, renumbered as if they were the whole tensor.

    ``strips[rank]``: the local rows that the rank sends, in ascending order; ``bounds`` and ``needs``: over these.
    """

    strips: tuple[tuple[Interval, ...], ...]
    bounds: Bounds
    needs: Needs


@lru_cache(maxsize=4096)
def plan_edges(bounds: Bounds, needs: Needs) -> EdgePlan:
    """The exchange of ``needs``, none of which is of the rank's own rows, renumbered without the rows that stay."""
    moving: list[list[int]] = []
    for lo, hi in sorted({interval for intervals in needs for interval in intervals if interval != EMPTY}):
        if moving and lo <= moving[-1][1]:
            moving[-1][1] = max(moving[-1][1], hi)
        else:
            moving.append([lo, hi])

    def number(row: int) -> int:
        return sum(min(max(row - lo, 0), hi - lo) for lo, hi in moving)

    strips = tuple(
        tuple((max(lo, a) - a, min(hi, b) - a) for lo, hi in moving if max(lo, a) < min(hi, b))
        for a, b in pairwise(bounds)
    )
    renumbered = tuple(tuple((number(lo), number(hi)) for lo, hi in intervals) for intervals in needs)
    return EdgePlan(strips, tuple(map(number, bounds)), renumbered)


@dataclass(frozen=True)
class Part:
    """Rows ``start:stop`` of one of the asked intervals, counted from that interval's first row."""

    interval: int
    start: int
    stop: int


@dataclass(frozen=True)
class TransferPlan:
    """One rank's share of an exchange; at most one message from each rank to each other rank.

    ``sends``: (peer, intervals of local rows); ``recvs``: (peer, parts in the order they are sent);
    ``own``: (local rows, part) for what the rank already holds; ``rows``: rows of each interval.
    """

    sends: tuple[tuple[int, tuple[Interval, ...]], ...]
    recvs: tuple[tuple[int, tuple[Part, ...]], ...]
    own: tuple[tuple[Interval, Part], ...]
    rows: tuple[int, ...]


@lru_cache(maxsize=4096)
def plan_transfer(bounds: Bounds, needs: Needs, rank: int) -> TransferPlan:
    """Who sends what to whom so that every rank gets the intervals of rows it needs."""
    sends = []
    for peer, intervals in enumerate(needs):
        local = [piece for piece, _ in _cut(intervals, bounds[rank], bounds[rank + 1])]
        if peer != rank and local:
            sends.append((peer, tuple(local)))
    recvs = []
    for peer in range(len(bounds) - 1):
        parts = [part for _, part in _cut(needs[rank], bounds[peer], bounds[peer + 1])]
        if peer != rank and parts:
            recvs.append((peer, tuple(parts)))
    own = _cut(needs[rank], bounds[rank], bounds[rank + 1])
    return TransferPlan(tuple(sends), tuple(recvs), tuple(own), tuple(hi - lo for lo, hi in needs[rank]))


class FetchPlan(NamedTuple):
    """One rank's part in a fetch of rows of a tensor: a ``TransferPlan`` in the terms of its dims.

    ``moves``: whether any rank needs any rows; ``order``: of the dims on the wire; ``shapes``: of the pieces; ``own``:
    rows that this rank has itself, and their places; ``to``, ``source``: peers; ``sends``, ``recvs``: which rows go
    to each, and where those from each belong; ``whole``: where all are whole pieces, which, and of how many elements;
    ``key``: what tells the fetch from others, on all ranks.
    """

    moves: bool
    order: list[int]
    shapes: list[list[int]]
    own: Sequence[tuple[Interval, Part]]
    to: list[int]
    sends: Sequence[Sequence[Interval]]
    source: list[int]
    recvs: Sequence[Sequence[Part]]
    whole: list[tuple[int, int]] | None
    key: tuple[Any, ...]


@lru_cache(maxsize=4096)
def plan_fetch(
    shape: tuple[int, ...], dim: int, bounds: Bounds, needs: Needs, rank: int, channels_last: bool
) -> FetchPlan:
    """The fetch of rows of dim ``dim`` of a tensor of which this rank holds ``shape``."""
    plan, order = plan_transfer(bounds, needs, rank), wire_order(len(shape), dim, channels_last)
    shapes = [[rows if d == dim else n for d, n in enumerate(shape)] for rows in plan.rows]
    to, source = [peer for peer, _ in plan.sends], [peer for peer, _ in plan.recvs]
    sends, recvs = [cut for _, cut in plan.sends], [parts for _, parts in plan.recvs]
    key = dim, bounds, needs, tuple(shape[d] for d in order[1:])
    whole = None
    if all(len(parts) == 1 and parts[0].stop - parts[0].start == plan.rows[parts[0].interval] for parts in recvs):
        whole = [(parts[0].interval, math.prod(shapes[parts[0].interval])) for parts in recvs]
    return FetchPlan(any(flat_needs(needs)), order, shapes, plan.own, to, sends, source, recvs, whole, key)


def wire_order(ndim: int, dim: int, channels_last: bool) -> list[int]:
    """How dims stand on the wire: rows first, then the others, with the channels last or in their own order.

    By what all ranks know alone: local strides are ambiguous for shards of one row, and must not decide it.
    """
    others = [d for d in range(ndim) if d != dim]
    if channels_last and 1 in others:
        others = [d for d in others if d != 1] + [1]
    return [dim, *others]


@lru_cache(maxsize=4096)
def flat_needs(needs: Needs) -> list[int]:
    """As operators carry them."""
    return [row for intervals in needs for interval in intervals for row in interval]


@lru_cache(maxsize=4096)
def grouped_needs(needs: tuple[int, ...], size: int) -> Needs:
    """The same by rank and interval again, of ``size`` ranks."""
    count, pairs = len(needs) // (2 * size), list(zip(needs[::2], needs[1::2], strict=True))
    return tuple(tuple(pairs[rank * count : (rank + 1) * count]) for rank in range(size))


def _cut(intervals: Sequence[Interval], lo: int, hi: int) -> list[tuple[Interval, Part]]:
    """The parts of the intervals that an owner of rows [lo, hi) holds, with their local rows."""
    cut = []
    for index, (start, stop) in enumerate(intervals):
        a, b = max(start, lo), min(stop, hi)
        if a < b:
            cut.append(((a - lo, b - lo), Part(index, a - start, b - start)))
    return cut
