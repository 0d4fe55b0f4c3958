"""Stencils against what torch really reads, found by impulses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from distpatch.layout.stencil import NearestStencil, WindowStencil
from distpatch.layout.transfers import plan_stencil

windows = st.builds(
    WindowStencil,
    kernel=st.integers(1, 6),
    stride=st.integers(1, 4),
    before=st.integers(0, 7),
    after=st.integers(0, 7),
    dilation=st.integers(1, 4),
)


def rows_read(stencil: WindowStencil, rows: int) -> list[set[int]]:
    """For each output row of a real convolution, the input rows that it depends on."""
    impulses = torch.eye(rows)[:, None]  # one picture a row: zero but for that row
    padded = F.pad(impulses, (stencil.before, stencil.after))
    out = F.conv1d(padded, torch.ones(1, 1, stencil.kernel), stride=stencil.stride, dilation=stencil.dilation)[:, 0]
    return [set(out[:, o].nonzero().flatten().tolist()) for o in range(out.shape[1])]


@given(windows, st.integers(1, 20), st.data())
def test_window(stencil: WindowStencil, rows: int, data: st.DataObject) -> None:
    """``need`` holds all rows that are read, and without dilation no other."""
    assume(rows + stencil.before + stencil.after >= stencil.span)
    read = rows_read(stencil, rows)
    assert stencil.out_rows(rows) == len(read)
    lo = data.draw(st.integers(0, len(read) - 1))
    hi = data.draw(st.integers(lo + 1, len(read)))
    start, stop = stencil.need(lo, hi)
    assert stop - start >= stencil.span
    wanted = set().union(*read[lo:hi])
    assert wanted <= set(range(start, stop))
    if stencil.dilation == 1 and stencil.stride <= stencil.kernel:
        assert wanted == set(range(max(start, 0), min(stop, rows)))


@given(windows, st.integers(0, 40))
def test_window_rows_stay_with_their_input(stencil: WindowStencil, row: int) -> None:
    """An output row belongs to the owner of the row in the middle of what it reads."""
    first = stencil.first_out(row)
    middle = (stencil.span - 1) // 2 - stencil.before
    assert first * stencil.stride + middle >= row
    assert (first - 1) * stencil.stride + middle < row


def nearest_sources(rows: int, **options: object) -> list[int]:
    picture = torch.arange(rows, dtype=torch.float32)[None, None, :, None]
    return F.interpolate(picture, **options)[0, 0, :, 0].long().tolist()


def test_nearest_by_size() -> None:
    """Every pair of small sizes."""
    for rows in range(1, 33):
        for out in range(1, 70):
            stencil = NearestStencil(rows, out, rows / out)
            assert [stencil.source(o) for o in range(out)] == nearest_sources(rows, size=(out, 1)), (rows, out)


@given(st.integers(1, 2000), st.integers(1, 4000))
def test_nearest_by_large_size(rows: int, out: int) -> None:
    """Where the product of row and scale is not exact in fp32."""
    stencil = NearestStencil(rows, out, rows / out)
    assert [stencil.source(o) for o in range(out)] == nearest_sources(rows, size=(out, 1))


@given(st.integers(1, 300), st.floats(0.1, 8) | st.integers(1, 8).map(float))
def test_nearest_by_factor(rows: int, factor: float) -> None:
    """A factor is used as it is given, although rows * factor is rounded down."""
    out = int(rows * factor)
    assume(out >= 1)
    stencil = NearestStencil(rows, out, 1 / factor)
    sources = nearest_sources(rows, scale_factor=(factor, 1.0))
    assert [stencil.source(o) for o in range(stencil.out_rows(rows))] == sources


@given(st.integers(1, 60), st.integers(1, 120), st.data())
def test_nearest_need(rows: int, out: int, data: st.DataObject) -> None:
    """The interval from the first to the last source."""
    stencil = NearestStencil(rows, out, rows / out)
    sources = nearest_sources(rows, size=(out, 1))
    lo = data.draw(st.integers(0, out - 1))
    hi = data.draw(st.integers(lo + 1, out))
    assert stencil.need(lo, hi) == (min(sources[lo:hi]), max(sources[lo:hi]) + 1)


@pytest.mark.parametrize("kernel,dilation", [(3, 1), (5, 1), (3, 2), (4, 1), (2, 1)])
def test_rows_do_not_drift(kernel: int, dilation: int) -> None:
    """Padding of its own and a window without, ten times over: every rank keeps its share."""
    window = WindowStencil(kernel, dilation=dilation)
    above, bounds = (window.span - 1) // 2, (0, 8, 16, 24)
    for _ in range(10):
        inner = [bound + above for bound in bounds[1:-1]]
        bounds = plan_stencil((0, *inner, bounds[-1] + window.span - 1), window).out
    assert bounds == (0, 8, 16, 24)
