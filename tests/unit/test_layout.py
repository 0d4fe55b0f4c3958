"""Layouts and transfer plans: integers only, simulated for all ranks at once."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from distpatch import LayoutError
from distpatch.layout.blocks import BlockLayout, InnerCut, cut_inside, layout_of
from distpatch.layout.rows import MANY, Bounds, Needs, Part, RowLayout, aligned_bounds, even_bounds
from distpatch.layout.shares import checked, shared_bounds, weights_of
from distpatch.layout.stencil import NearestStencil, WindowStencil
from distpatch.layout.transfers import TransferPlan, needs_in_order, plan_stencil, plan_transfer
from tests.unit.test_stencil import windows


@st.composite
def bounds_of(draw: st.DrawFn, most_rows: int = 24, most_ranks: int = 6) -> Bounds:
    rows, world = draw(st.integers(0, most_rows)), draw(st.integers(1, most_ranks))
    return (0, *sorted(draw(st.integers(0, rows)) for _ in range(world - 1)), rows)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[Bounds, Needs]:
    """Any layout, and any intervals that its ranks may ask for."""
    bounds = draw(bounds_of())
    row = st.integers(0, bounds[-1])
    interval = st.tuples(row, row).map(lambda ends: (min(ends), max(ends)))
    count = draw(st.integers(1, 3))
    return bounds, tuple(tuple(draw(interval) for _ in range(count)) for _ in bounds[1:])


@given(st.integers(0, 100), st.integers(1, 12))
def test_even_bounds(rows: int, world: int) -> None:
    sizes = [hi - lo for lo, hi in pairwise(even_bounds(rows, world))]
    assert (len(sizes), sum(sizes)) == (world, rows)
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


speeds = st.lists(st.floats(0.01, 100), min_size=1, max_size=6).map(tuple)


@given(st.integers(0, 300), speeds)
@example(1, (1.0, 1.0))
@example(1, (2.0, 2.0, 1.0))
def test_bounds_by_weights(rows: int, weights: tuple[float, ...]) -> None:
    heights = [hi - lo for lo, hi in pairwise(shared_bounds(rows, len(weights), weights))]
    shares = [rows * weight / sum(weights) for weight in weights]
    assert (len(heights), sum(heights)) == (len(weights), rows)
    if sum(share >= 0.5 for share in shares) <= rows:
        assert all(height for height, share in zip(heights, shares, strict=True) if share > 0.5 + 1e-9)
    slowest = max(height / share for height, share in zip(heights, shares, strict=True)) if rows else 0.0
    if min(shares) >= 16:
        assert slowest < 1.1
    for a, b in permutations(range(len(weights)), 2):
        if weights[a] < weights[b]:  # of equal ones the first has a row more (test_bounds_by_equal_weights_are_even)
            assert heights[a] <= heights[b] + rows // 16


@given(st.integers(0, 100), st.integers(1, 12), st.floats(0.01, 100))
def test_bounds_by_equal_weights_are_even(rows: int, world: int, weight: float) -> None:
    assert shared_bounds(rows, world, (weight,) * world) == even_bounds(rows, world)


@pytest.mark.parametrize("weights", [(1.0, 2.0), (3.0, 1.0, 2.0), (1.0, 0.3)], ids=str)
def test_bounds_by_weights_of_a_picture_are_those_of_its_latents(weights: tuple[float, ...]) -> None:
    latents, picture = (shared_bounds(rows, len(weights), weights) for rows in (64, 512))
    assert picture == tuple(8 * bound for bound in latents)


@pytest.mark.parametrize(
    ("rows", "weights", "heights"),
    [(6, (1, 2), (2, 4)), (7, (1, 0.1), (6, 1)), (4, (1, 0.1), (4, 0)), (3, (3, 1, 2), (1, 1, 1)), (1, (1, 2), (0, 1))],
)
def test_few_rows_by_weights(rows: int, weights: tuple[float, ...], heights: tuple[int, ...]) -> None:
    bounds = shared_bounds(rows, len(weights), weights)
    assert tuple(hi - lo for lo, hi in pairwise(bounds)) == heights


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (1, 0), (1, -1), (1, float("nan")), (1, float("inf")), 3, "fast"])
def test_weights_that_are_none(weights: object) -> None:
    with pytest.raises(ValueError, match="weights is"):
        checked(weights_of(weights), 2)


@given(bounds_of(), st.integers(1, 5))
def test_aligned_bounds(bounds: Bounds, unit: int) -> None:
    aligned = aligned_bounds(bounds, unit)
    assert aligned[-1] == bounds[-1]
    last = bounds[-1] - bounds[-1] % unit
    for a, b in zip(aligned[:-1], bounds[:-1], strict=True):
        assert a % unit == 0 and (2 * abs(b - a) <= unit or a == last < b)
    assert list(aligned) == sorted(aligned)


@pytest.mark.parametrize("bounds", [(), (0,), (1, 4), (0, 3, 2), (0, -1, 2)], ids=str)
def test_bounds_that_are_none(bounds: Bounds) -> None:
    with pytest.raises(LayoutError, match="bounds"):
        RowLayout(2, bounds)


def test_layout_is_a_value() -> None:
    layout = RowLayout(2, (0, 3, 3, 7))
    assert (layout.size, layout.world_size, layout.interval(1), layout.interval(2)) == (7, 3, (3, 3), (3, 7))
    assert layout.with_dim(2) is layout and layout.with_bounds((0, 3, 3, 7)) is layout
    assert layout.with_dim(1) == RowLayout(1, (0, 3, 3, 7)) and layout.with_bounds((0, 7)) == RowLayout(2, (0, 7))
    assert len({layout, RowLayout(2, (0, 3, 3, 7))}) == 1


def assert_covers(bounds: Bounds, stencil: WindowStencil | NearestStencil, rows_out: int) -> None:
    """Each rank owns or fetches every row that its output reads, and fetches no row twice or without need."""
    plan = plan_stencil(bounds, stencil)
    assert plan.out[0] == 0 and plan.out[-1] == rows_out and len(plan.out) == len(bounds)
    for rank, (lo, hi) in enumerate(pairwise(plan.out)):
        assert lo <= hi
        own = set(range(bounds[rank], bounds[rank + 1]))
        above, below = (set(range(*interval)) for interval in plan.needs[rank])
        needed = set(range(*stencil.need(lo, hi))) & set(range(bounds[-1])) if lo < hi else set()
        assert needed <= own | above | below
        assert above | below == needed - own and not above & below
        assert all(row < bounds[rank] for row in above) and all(row >= bounds[rank + 1] for row in below)


@given(bounds_of(), windows)
def test_window_plans(bounds: Bounds, stencil: WindowStencil) -> None:
    rows_out = stencil.out_rows(bounds[-1])
    assume(rows_out >= 0)
    assert_covers(bounds, stencil, rows_out)


@given(bounds_of(), st.integers(1, 50))
def test_nearest_plans(bounds: Bounds, rows_out: int) -> None:
    assume(bounds[-1] > 0)
    assert_covers(bounds, NearestStencil(bounds[-1], rows_out, bounds[-1] / rows_out), rows_out)


@given(exchanges())
def test_transfers_deliver(exchange: tuple[Bounds, Needs]) -> None:
    """All ranks' plans together: sends meet receives, at most one a pair, and every row arrives."""
    bounds, needs = exchange
    plans = [plan_transfer(bounds, needs, rank) for rank in range(len(needs))]
    mail = {}
    for rank, plan in enumerate(plans):
        for peer, cut in plan.sends:
            assert peer != rank and (rank, peer) not in mail, "one message a pair"
            shard = range(bounds[rank], bounds[rank + 1])
            mail[rank, peer] = [row for lo, hi in cut for row in shard[lo:hi]]
    for rank, plan in enumerate(plans):
        assert received(plan, rank, bounds, mail) == [list(range(lo, hi)) for lo, hi in needs[rank]]
    assert not mail, "every message is received"


def received(
    plan: TransferPlan, rank: int, bounds: Bounds, mail: dict[tuple[int, int], list[int]]
) -> list[list[int | None]]:
    """The rows that end up in each of a rank's intervals."""
    pieces: list[list[int | None]] = [[None] * rows for rows in plan.rows]
    for (lo, hi), part in plan.own:
        pieces[part.interval][part.start : part.stop] = range(bounds[rank], bounds[rank + 1])[lo:hi]
    for peer, parts in plan.recvs:
        message = mail.pop((peer, rank))
        for part in parts:
            size = part.stop - part.start
            pieces[part.interval][part.start : part.stop] = message[:size]
            message = message[size:]
        assert not message, "no row too many"
    return pieces


@st.composite
def joined(draw: st.DrawFn) -> RowLayout:
    """Parts of any blocks, on as many ranks each."""
    world = draw(st.integers(1, 4))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.integers(0, 5))
        inner = (0, *sorted(draw(st.integers(0, rows)) for _ in range(world - 1)), rows)
        parts.append(Part(inner, draw(st.sampled_from([(), (2,), (3,), (2, 3), (3, 1, 2)]))))
    return layout_of(1, parts)


def held_rows(layout: RowLayout, rank: int) -> list[int]:
    """The global rows of a rank, in its order; slowly, by what parts and blocks mean."""
    rows, first = [], 0
    for inner, blocks in layout.parts:
        for block in range(math.prod(blocks)):
            rows += [first + block * inner[-1] + row for row in range(inner[rank], inner[rank + 1])]
        first += math.prod(blocks) * inner[-1]
    return rows


@given(joined())
def test_rows_of_blocks_and_joined_tensors(layout: RowLayout) -> None:
    held = [held_rows(layout, rank) for rank in range(layout.world_size)]
    assert sorted(row for rows in held for row in rows) == list(range(layout.size))
    assert layout.heights == tuple(map(len, held))
    if isinstance(layout, BlockLayout):
        for rank, rows in enumerate(held):
            assert [row for lo, hi in layout.intervals(rank) for row in range(lo, hi)] == rows


@given(joined(), st.data())
def test_slices_of_blocks_and_joined_tensors(layout: RowLayout, data: st.DataObject) -> None:
    lo = data.draw(st.integers(0, layout.size))
    hi = data.draw(st.integers(lo, layout.size))
    cut = layout_of(1, (cut.rows for cut in layout.cuts(lo, hi)))
    assert cut.size == hi - lo
    for rank in range(layout.world_size):
        assert held_rows(cut, rank) == [row - lo for row in held_rows(layout, rank) if lo <= row < hi]
        assert layout.rows_before(lo, rank) == sum(row < lo for row in held_rows(layout, rank))


@given(joined(), st.data())
def test_blocks_and_joined_tensors_in_order(layout: RowLayout, data: st.DataObject) -> None:
    assume(isinstance(layout, BlockLayout))
    assert isinstance(layout, BlockLayout)
    bounds = (0, *sorted(data.draw(st.integers(0, layout.size)) for _ in range(layout.world_size - 1)), layout.size)
    as_held = [row for rank in range(layout.world_size) for row in held_rows(layout, rank)]
    for (lo, hi), needs in zip(pairwise(bounds), needs_in_order(layout, bounds), strict=True):
        assert [as_held[at] for a, b in needs for at in range(a, b)] == list(range(lo, hi))


@given(bounds_of(), st.integers(1, 4), st.data())
def test_slices_where_there_are_no_columns(bounds: Bounds, width: int, data: st.DataObject) -> None:
    """Tokens of an image whose height is sharded over an inner axis: who would have which is known without columns too."""
    assume(bounds[-1] > 0)
    height = bounds[-1]
    first = data.draw(st.integers(0, height - 1))
    last = data.draw(st.integers(first + 1, height))
    text = Part((0,) * (len(bounds) - 1) + (3,))
    share = (first, last, height)
    some, none = (layout_of(1, [text, Part(tuple(b * w for b in bounds))]) for w in (width, MANY))
    (rows,) = cut_inside(some, 3 + first * width, [InnerCut(1, share, (last - first) * width)])
    (void,) = cut_inside(none, 3, [InnerCut(1, share, 0)])
    assert none.size == 3 and void[0].void
    assert [b // width for b in rows[0].inner] == [b // MANY for b in void[0].inner]
    assert cut_inside(none, 0, [InnerCut(0, (0, 1, 1), 3)]) == [[text]]
