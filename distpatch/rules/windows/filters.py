"""Rows as weighted sums of rows: the filters of ``interpolate`` and the means of adaptive pooling.

Indices and weights are computed on the tensor's device from ``arange``, in the precision and by the
formulas of torch's kernels (ATen's UpSample.h), so nothing is copied from the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distpatch.layout.stencil import AreaStencil, FilterStencil, float32
from distpatch.rules.core.halo import run_stencil
from distpatch.rules.core.operands import precise
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.memory_format import memory_format

Taps = Iterator[tuple[Tensor, Tensor]]  # one input row of every output row: (its index, its weight)


@dataclass(frozen=True)
class Filter:
    """``weight`` of the distance to an output row's centre, in rows, which is 0 from ``reach`` on."""

    weight: Callable[[Tensor], Tensor]
    reach: int


def cubic(a: float) -> Callable[[Tensor], Tensor]:
    """The cubic convolution kernel of parameter a (Keys, IEEE ASSP 29, 1981)."""

    def weight(distance: Tensor) -> Tensor:
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))

    return weight


def triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0)


def lanczos(distance: Tensor) -> Tensor:
    return torch.where(distance < 3, torch.sinc(distance) * torch.sinc(distance / 3), 0.0)


# Of (mode, spatial dims, antialias): all that torch has.
FILTERS = {
    ("linear", 1, False): Filter(triangle, 1),
    ("bilinear", 2, False): Filter(triangle, 1),
    ("trilinear", 3, False): Filter(triangle, 1),
    ("bicubic", 2, False): Filter(cubic(-0.75), 2),
    ("bilinear", 2, True): Filter(triangle, 1),
    ("bicubic", 2, True): Filter(cubic(-0.5), 2),  # as in Pillow
    ("lanczos", 2, True): Filter(lanczos, 3),
}


def filtered(x: PatchTensor, stencil: FilterStencil, filter: Filter, antialias: bool, func: Any) -> PatchTensor:
    """The rows resized by a filter, in fp32 or better."""
    make = _antialias_taps if antialias else _filter_taps
    return _resampled(x, stencil, lambda row, dtype: make(stencil, filter, row, dtype), func)


def averaged(x: PatchTensor, rows_out: int, func: Any) -> PatchTensor:
    """The means over ``rows_out`` equal parts of the rows, which may share a row, in fp32 or better."""
    stencil = AreaStencil(x.row_layout.size, rows_out)
    return _resampled(x, stencil, lambda row, dtype: _area_taps(stencil, row, dtype), func)


def _resampled(
    x: PatchTensor,
    stencil: FilterStencil | AreaStencil,
    taps: Callable[[Tensor, torch.dtype], Taps],
    func: Any,
) -> PatchTensor:
    dim, shape = x.row_layout.dim, [-1 if d == x.row_layout.dim else 1 for d in range(x.ndim)]

    def weighted_sum(rows: Tensor, start: int, lo: int, hi: int) -> Tensor:
        rows = rows.to(precise(rows.dtype))
        total = None
        for index, weight in taps(torch.arange(lo, hi, device=rows.device), rows.dtype):
            picked, share = rows.index_select(dim, index.long() - start), weight.view(shape)
            total = picked * share if total is None else torch.addcmul(total, picked, share)
        assert total is not None
        return total.contiguous(memory_format=memory_format(rows))

    return run_stencil(func, x, stencil, weighted_sum)


def _centre(stencil: FilterStencil, row: Tensor, dtype: torch.dtype) -> Tensor:
    """In fp32, rounded once: kernels for lower dtypes multiply and subtract in one operation.

    A row's place in an image of thousands of rows has an error of 1e-4 rows; it must be the same error.
    """
    scale = stencil.scale if dtype == torch.float64 else float32(stencil.scale)
    row = row.double()
    return (row * scale if stencil.corners else (row + 0.5) * scale - 0.5).to(dtype)


def _filter_taps(stencil: FilterStencil, filter: Filter, row: Tensor, dtype: torch.dtype) -> Taps:
    """Rows beyond the image are its edge rows."""
    centre = _centre(stencil, row, dtype)
    first = centre.floor() - (filter.reach - 1)
    for offset in range(2 * filter.reach):
        at = first + offset
        yield at.clamp(0, stencil.rows_in - 1), filter.weight((at - centre).abs())


def _antialias_taps(stencil: FilterStencil, filter: Filter, row: Tensor, dtype: torch.dtype) -> Taps:
    """The filter is as much wider as the image becomes smaller; there are no rows beyond the image."""
    centre = _centre(stencil, row, dtype)
    first = ((centre - stencil.reach).floor() + 1).clamp(min=0)
    last = ((centre + stencil.reach).ceil() - 1).clamp(max=stencil.rows_in - 1)
    taps = []
    for offset in range(math.ceil(2 * stencil.reach) + 1):
        at = first + offset
        weight = filter.weight((at - centre).abs() * (filter.reach / stencil.reach))
        taps.append((torch.minimum(at, last), torch.where(at <= last, weight, 0.0)))
    whole = torch.stack([weight for _, weight in taps]).sum(0)
    yield from ((at, weight / whole) for at, weight in taps)


def _area_taps(stencil: AreaStencil, row: Tensor, dtype: torch.dtype) -> Taps:
    first = row * stencil.rows_in // stencil.rows_out
    stop = ((row + 1) * stencil.rows_in + stencil.rows_out - 1) // stencil.rows_out
    last, share = stop - 1, 1 / (stop - first).to(dtype)
    times = stencil.widest - (last - first)  # so often the last row is taken, of whose share: 0 times infinity is no 0
    for offset in range(stencil.widest):
        at = first + offset
        yield torch.minimum(at, last), torch.where(at < last, share, share / times)


def enlarged(
    x: PatchTensor, stencil: FilterStencil, times: int, resize: Callable[[Tensor], Tensor], func: Any
) -> PatchTensor:
    """Rows resized by ``resize``: a kernel of torch that makes ``times`` rows of each, a power of two.

    The halo keeps what happens at the edge of the slab out of this rank's rows. For other factors
    centres are rounded, and how depends on where an image begins.
    """

    def crop(rows: Tensor, start: int, lo: int, hi: int) -> Tensor:
        return resize(rows).narrow(x.row_layout.dim, lo - start * times, hi - lo)

    return run_stencil(func, x, stencil, crop, growth=times)
