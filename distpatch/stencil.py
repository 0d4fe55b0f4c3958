"""Which input rows an output row reads: integers only, no tensors.

A *stencil* is any object with ``out_rows(rows_in)``, ``need(lo, hi)`` (the half-open interval of
input rows that output rows ``[lo, hi)`` read; it may reach beyond the image) and ``first_out(row)``
(the first output row that belongs to the owner of input row ``row`` or of a row below it).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

Interval = tuple[int, int]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class WindowStencil:
    """A sliding window (convolution, pooling): output row o reads from ``o * stride - before`` on.

    ``before`` and ``after`` are the rows of padding above and below the image.
    """

    kernel: int
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1

    @property
    def span(self) -> int:
        """Input rows from the first to the last that one output row reads."""
        return self.dilation * (self.kernel - 1) + 1

    def out_rows(self, rows_in: int) -> int:
        return (rows_in + self.before + self.after - self.span) // self.stride + 1

    def need(self, lo: int, hi: int) -> Interval:
        start = lo * self.stride - self.before
        return start, start + (hi - 1 - lo) * self.stride + self.span

    def first_out(self, row: int) -> int:
        return ceil_div(row, self.stride)


@dataclass(frozen=True)
class NearestStencil:
    """Nearest-neighbour resize from ``rows_in`` to ``rows_out``: output row o reads ``source(o)``.

    ``scale`` is input rows per output row: ``1 / scale_factor`` where a factor was given, else
    ``rows_in / rows_out``. The source row is computed in fp32, as torch does for every dtype
    (``nearest_neighbor_compute_source_index`` in ATen's UpSample.h). ``short_cuts``: equal and doubled
    sizes ignore the scale, which torch's 2-D kernel does and its 1-D and 3-D kernels do not.
    """

    rows_in: int
    rows_out: int
    scale: float
    short_cuts: bool = True

    def source(self, row: int) -> int:
        if self.short_cuts and self.rows_out in (self.rows_in, 2 * self.rows_in):
            return row * self.rows_in // self.rows_out
        return min(int(_float32(row * _float32(self.scale))), self.rows_in - 1)

    def out_rows(self, rows_in: int) -> int:
        assert rows_in == self.rows_in
        return self.rows_out

    def need(self, lo: int, hi: int) -> Interval:
        return self.source(lo), self.source(hi - 1) + 1

    def first_out(self, row: int) -> int:
        return ceil_div(row * self.rows_out, self.rows_in)


def _float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
