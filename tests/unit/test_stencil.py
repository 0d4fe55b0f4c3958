"""Stencils against what torch really reads and picks, found by impulses and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from distpatch.layout.stencil import AreaStencil, FilterStencil, NearestStencil, TransposedStencil, WindowStencil
from distpatch.layout.transfers import plan_stencil
from distpatch.rules.windows.filters import FILTERS
from distpatch.torch_utils import private

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


def dependencies(out: Tensor, x: Tensor, row: int) -> list[int]:
    """The input rows that output row ``row`` changes with."""
    (grad,) = torch.autograd.grad(out[..., row].sum(), x, retain_graph=True)
    return grad.flatten().nonzero().flatten().tolist()


@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(0, 3), st.integers(1, 12)
)  # fmt: skip
def test_transposed_window_reads_what_a_transposed_convolution_reads(
    kernel: int, stride: int, before: int, dilation: int, extra: int, rows: int
) -> None:
    stencil = TransposedStencil(kernel, stride, before, dilation, extra)
    assume(extra < max(stride, dilation) and stencil.out_rows(rows) >= 1)
    x = torch.ones(1, 1, rows, requires_grad=True)
    out = F.conv_transpose1d(x, torch.ones(1, 1, kernel), None, stride, before, extra, 1, dilation)
    assert stencil.out_rows(rows) == out.shape[-1]
    for row in range(out.shape[-1]):
        lo, hi = stencil.need(row, row + 1)
        read = dependencies(out, x, row)
        assert set(read) <= set(range(lo, hi))
        assert dilation > 1 or read == list(range(max(lo, 0), min(hi, rows)))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.integers(1, 20))
def test_ceil_mode_counts_as_torch_does(kernel: int, stride: int, padding: int, rows: int) -> None:
    stencil = WindowStencil(kernel, stride, padding, padding, ceil_mode=True)
    assume(2 * padding <= kernel and stencil.out_rows(rows) >= 1)
    pooled = F.avg_pool1d(torch.ones(1, 1, rows), kernel, stride, padding, ceil_mode=True)
    assert stencil.out_rows(rows) == pooled.shape[-1]


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_nearest_exact(rows: int, size: int, by_factor: bool) -> None:
    scale = 1 / (size / rows) if by_factor else rows / size
    stencil = NearestStencil(rows, size, scale, exact=True)
    image = torch.arange(float(rows)).view(1, 1, rows, 1)
    how = {"scale_factor": (size / rows, 1.0)} if by_factor else {"size": (size, 1)}
    assume(not by_factor or int(rows * (size / rows)) == size)
    picked = F.interpolate(image, mode="nearest-exact", **how).flatten()
    assert [stencil.source(row) for row in range(size)] == picked.tolist()
    if stencil.repeats is not None:
        assert torch.equal(picked, image.flatten().repeat_interleave(stencil.repeats))


def test_rows_out_of_step_are_not_repeats() -> None:
    assert NearestStencil(3, 9, 1 / 3).repeats == 3
    assert NearestStencil(100, 4100, 1 / 41).repeats is None
    assert NearestStencil(4, 6, 4 / 6).repeats is None


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from([kind for kind in FILTERS if kind[0] != "lanczos" or private.RELEASE >= (2, 13)]),
    st.booleans(),
)
def test_filter_reads_no_more_than_its_stencil_says(
    rows: int, size: int, kind: tuple[str, int, bool], corners: bool
) -> None:
    mode, spatial, antialias = kind
    assume(not (corners and antialias))
    scale = ((rows - 1) / (size - 1) if size > 1 else 0.0) if corners else rows / size
    reach = FILTERS[kind].reach * (max(scale, 1.0) if antialias else 1.0)
    stencil = FilterStencil(rows, size, scale, reach, corners)
    x = torch.arange(1.0, 1.0 + rows).view(1, 1, rows, *[1] * (spatial - 1)).requires_grad_()
    target = (size, *[1] * (spatial - 1))
    out = F.interpolate(x, target, mode=mode, align_corners=corners, antialias=antialias).view(1, 1, size)
    for row in range(size):
        lo, hi = stencil.need(row, row + 1)
        assert 0 <= lo < hi <= rows
        assert set(dependencies(out, x, row)) <= set(range(lo, hi))


@given(st.integers(1, 30), st.integers(1, 30))
def test_adaptive_reads_its_part(rows: int, size: int) -> None:
    stencil = AreaStencil(rows, size)
    x = torch.ones(1, 1, rows, requires_grad=True)
    out = F.adaptive_avg_pool1d(x, size)
    parts = [stencil.need(row, row + 1) for row in range(size)]
    assert [dependencies(out, x, row) for row in range(size)] == [list(range(*part)) for part in parts]
    assert stencil.widest - 1 <= max(hi - lo for lo, hi in parts) <= stencil.widest
