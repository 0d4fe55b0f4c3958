"""Which input rows an output row reads: integers only, no tensors.

A *stencil* is any object with ``out_rows(rows_in)``, ``need(lo, hi)`` (the half-open interval of
input rows that output rows ``[lo, hi)`` read; it may reach beyond the image) and ``first_out(row)``
(the first output row that belongs to the owner of input row ``row`` or of a row below it).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache

Interval = tuple[int, int]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class WindowStencil:
    """A sliding window (convolution, pooling): output row o reads from ``o * stride - before`` on.

    ``before`` and ``after`` are the rows of padding above and below the image. With ``ceil_mode`` a last
    window may reach beyond the padding, if it begins in the image or in the padding above it.
    """

    kernel: int
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1
    ceil_mode: bool = False

    @property
    def span(self) -> int:
        """Input rows from the first to the last that one output row reads."""
        return self.dilation * (self.kernel - 1) + 1

    def out_rows(self, rows_in: int) -> int:
        spare = rows_in + self.before + self.after - self.span
        if not self.ceil_mode:
            return spare // self.stride + 1
        last = ceil_div(spare, self.stride)
        return last + (last * self.stride < rows_in + self.before)

    def need(self, lo: int, hi: int) -> Interval:
        start = lo * self.stride - self.before
        return start, start + (hi - 1 - lo) * self.stride + self.span

    def first_out(self, row: int) -> int:
        """By the middle of the window, so that rows do not drift through padding and windows without any."""
        return ceil_div(row + self.before - (self.span - 1) // 2, self.stride)


@dataclass(frozen=True)
class TransposedStencil:
    """A window turned round (transposed convolution, fold): input row i writes rows from
    ``i * stride - before`` on.

    ``before`` rows are cut off above and below; ``extra`` rows are added below (output padding). An
    output row may read no input row at all: then the interval is empty.
    """

    kernel: int
    stride: int = 1
    before: int = 0
    dilation: int = 1
    extra: int = 0

    @property
    def span(self) -> int:
        """Output rows from the first to the last that one input row writes."""
        return self.dilation * (self.kernel - 1) + 1

    def out_rows(self, rows_in: int) -> int:
        return (rows_in - 1) * self.stride - 2 * self.before + self.span + self.extra

    def need(self, lo: int, hi: int) -> Interval:
        first = ceil_div(lo + self.before - (self.span - 1), self.stride)
        return first, (hi - 1 + self.before) // self.stride + 1

    def first_out(self, row: int) -> int:
        return row * self.stride


@dataclass(frozen=True)
class NearestStencil:
    """Nearest-neighbour resize from ``rows_in`` to ``rows_out``: output row o reads ``source(o)``.

    ``scale`` is input rows per output row: ``1 / scale_factor`` where a factor was given, else
    ``rows_in / rows_out``. The source row is computed in fp32, as torch does for every dtype
    (``nearest_neighbor_compute_source_index`` in ATen's UpSample.h). ``short_cuts``: equal and doubled
    sizes ignore the scale, which torch's 2-D kernel does and its 1-D and 3-D kernels do not. ``exact``
    (mode "nearest-exact"): the row under the middle of the output row.
    """

    rows_in: int
    rows_out: int
    scale: float
    short_cuts: bool = True
    exact: bool = False

    def source(self, row: int) -> int:
        if self.short_cuts and not self.exact and self.rows_out in (self.rows_in, 2 * self.rows_in):
            return row * self.rows_in // self.rows_out
        middle = row + 0.5 if self.exact else row
        return min(int(float32(middle * float32(self.scale))), self.rows_in - 1)

    @property
    def repeats(self) -> int | None:
        """How often each input row is repeated; None where they are not all repeated as often."""
        return _repeats(self)

    def out_rows(self, rows_in: int) -> int:
        assert rows_in == self.rows_in
        return self.rows_out

    def need(self, lo: int, hi: int) -> Interval:
        return self.source(lo), self.source(hi - 1) + 1

    def first_out(self, row: int) -> int:
        return ceil_div(row * self.rows_out, self.rows_in)


@lru_cache(maxsize=4096)
def _repeats(stencil: NearestStencil) -> int | None:
    # Not by the factor alone: 41 * fp32(1 / 41) < 1, so torch enlarges by 41 with rows out of step.
    times, rest = divmod(stencil.rows_out, stencil.rows_in)
    if rest or any(stencil.source(row) != row // times for row in range(stencil.rows_out)):
        return None
    return times


@dataclass(frozen=True)
class FilterStencil:
    """Resize by a filter: output row o weighs the input rows nearer than ``reach`` to ``centre(o)``.

    ``scale`` is input rows per output row; ``corners``: the first and last rows' centres coincide
    (``align_corners``), else their edges do. Rows beyond the image are its edge rows.
    """

    rows_in: int
    rows_out: int
    scale: float
    reach: float
    corners: bool = False

    def centre(self, row: int) -> float:
        return row * self.scale if self.corners else (row + 0.5) * self.scale - 0.5

    def out_rows(self, rows_in: int) -> int:
        assert rows_in == self.rows_in
        return self.rows_out

    def need(self, lo: int, hi: int) -> Interval:
        # Kernels find the centre in fp32: it may fall a little to either side of an input row.
        first = math.floor(self.centre(lo) - self.reach - _SLACK) + 1
        stop = math.ceil(self.centre(hi - 1) + self.reach + _SLACK)
        return min(max(first, 0), self.rows_in - 1), min(max(stop, 1), self.rows_in)

    def first_out(self, row: int) -> int:
        return ceil_div(row * self.rows_out, self.rows_in)


_SLACK = 1 / 64  # rows; fp32 places row 100,000 to within 1/128


@dataclass(frozen=True)
class AreaStencil:
    """Adaptive pooling: output row o reads the rows that the o-th of ``rows_out`` equal parts touches."""

    rows_in: int
    rows_out: int

    @property
    def widest(self) -> int:
        """The most input rows that an output row reads; exact, or one too many."""
        return min(ceil_div(self.rows_in, self.rows_out) + (self.rows_in % self.rows_out > 0), self.rows_in)

    def out_rows(self, rows_in: int) -> int:
        assert rows_in == self.rows_in
        return self.rows_out

    def need(self, lo: int, hi: int) -> Interval:
        return lo * self.rows_in // self.rows_out, ceil_div(hi * self.rows_in, self.rows_out)

    def first_out(self, row: int) -> int:
        return ceil_div(row * self.rows_out, self.rows_in)


def float32(value: float) -> float:
    """The nearest fp32 number."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
