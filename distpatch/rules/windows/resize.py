"""Resizing over the sharded dim: every mode of ``interpolate``, by size and by factor."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.layout.stencil import FilterStencil, Interval, NearestStencil, ceil_div
from distpatch.rules.core.executor import run_rows
from distpatch.rules.core.halo import run_stencil
from distpatch.rules.core.operands import needs_grad, per_dim, precise
from distpatch.rules.core.registry import first_dim, named, rule
from distpatch.rules.core.wrapping import beside_rows, wrap
from distpatch.rules.windows.filters import FILTERS, enlarged, filtered
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.memory_format import in_memory_order, memory_order
from distpatch.torch_utils.op_names import op_name


@rule(*named("interpolate"), of_many_kernels=True, order_free=first_dim)
def interpolate(
    func: Any,
    input: PatchTensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    how = (mode, align_corners, recompute_scale_factor, antialias)
    spatial, axis, shape = input.ndim - 2, input.row_layout.dim - 2, input.shape[2:]
    if axis < 0:  # whole images, or whole channels
        return beside_rows(func, input, size, scale_factor, *how)
    nearest, smooth = mode.startswith("nearest"), (mode, spatial, antialias) in FILTERS
    factors = None if scale_factor is None else per_dim(scale_factor, spatial)
    if factors is None:
        sizes: list[Any] = [n if n is None else operator.index(n) for n in per_dim(size, spatial)]
    else:
        sizes = [int(n * f) for n, f in zip(shape, factors)]
    valid = (size is None) != (factors is None) and not (size and recompute_scale_factor) and 0 not in sizes
    if not valid or not (nearest or smooth or mode == "area") or (smooth and not input.dtype.is_floating_point):
        return NotImplemented  # or torch says what is wrong
    if mode == "area":
        return getattr(F, f"adaptive_avg_pool{spatial}d")(input, sizes)
    factors = None if recompute_scale_factor else factors
    resize = Resize(func, axis, sizes, factors, mode, align_corners, antialias)
    # 7 rows by 1.1 are 7 rows: a copy, or resized by 1.1, as kernel, device and direction have it.
    unclear = factors is not None and any(1 < n == m and f != 1 for n, m, f in zip(shape, sizes, factors))
    if unclear and (not nearest or (mode == "nearest" and spatial != 2 and needs_grad(input.local))):
        return NotImplemented
    return (_nearest if nearest else _smooth)(input, resize)


@dataclass(frozen=True)
class Resize:
    """A call of ``interpolate``, to ``sizes`` (by ``factors``, where these set the scale), for slabs of rows."""

    func: Any
    axis: int
    sizes: Sequence[int]
    factors: Sequence[float] | None
    mode: str
    align_corners: bool | None
    antialias: bool

    def scale(self, rows_in: int) -> float:
        """Input rows an output row."""
        rows_out = self.sizes[self.axis]
        if self.align_corners:
            return (rows_in - 1) / (rows_out - 1) if rows_out > 1 else 0.0
        return rows_in / rows_out if self.factors is None else 1 / self.factors[self.axis]

    def __call__(self, part: Tensor, times: int = 1) -> Tensor:
        """Torch's own on these rows, making ``times`` rows of each, and the columns that there are to be."""
        axis, how = self.axis, (self.mode, self.align_corners, None, self.antialias)
        size = [*self.sizes[:axis], part.shape[axis + 2] * times, *self.sizes[axis + 1 :]]
        factors = self.factors and [*self.factors[:axis], times, *self.factors[axis + 1 :]]
        given = (None, factors) if factors else (size, None)
        if self.antialias and size[-1] == 1:  # torch 2.13 resizes a column wrongly on a CPU, but a row rightly
            turned = self.func(part.mT, *(n and n[::-1] for n in given), *how).mT
            return in_memory_order(turned, memory_order(part))
        return self.func(part, *given, *how)


def _nearest(x: PatchTensor, resize: Resize) -> PatchTensor:
    rows_in, rows_out, spatial = x.row_layout.size, resize.sizes[resize.axis], x.ndim - 2
    exact = resize.mode == "nearest-exact"
    stencil = NearestStencil(rows_in, rows_out, resize.scale(rows_in), spatial == 2, exact)

    def pick(rows: Tensor, start: int, lo: int, hi: int) -> Tensor:
        out = torch.arange(lo, hi, device=rows.device, dtype=torch.float32) + 0.5 * exact
        source = (out * stencil.scale).long().clamp(max=rows_in - 1)
        return rows.index_select(x.row_layout.dim, source - start)

    times, dim = stencil.repeats or 1, x.row_layout.dim
    source = x if stencil.repeats else run_stencil(resize.func, x, stencil, pick)

    def enlarge(parts: Sequence[Tensor], spare: Sequence[Tensor], lo: int, hi: int) -> Tensor:
        rows = resize(parts[0], times)
        return rows if rows.shape[dim] == hi - lo else rows.narrow(dim, lo % times, hi - lo)

    def need(lo: int, hi: int) -> Interval:
        return lo // times, ceil_div(hi, times)

    layout = source.row_layout.with_bounds(tuple(times * bound for bound in source.row_layout.bounds))
    shape = [*x.shape[:2], *resize.sizes]
    shape[dim] = source.local_or_recipe.shape[dim] * times
    return run_rows(op_name(resize.func), [source], enlarge, need=need, shape=shape, layout=layout)


def _smooth(x: PatchTensor, resize: Resize) -> PatchTensor:
    """Columns by torch, rows by their filter, in fp32 or better; first whichever leaves less for the other."""
    rows_in, rows_out, spatial = x.row_layout.size, resize.sizes[resize.axis], x.ndim - 2
    antialias, scale, times = resize.antialias, resize.scale(rows_in), rows_out // rows_in
    filter = FILTERS[resize.mode, spatial, antialias]
    reach = filter.reach * (max(scale, 1.0) if antialias else 1.0)
    corners = bool(resize.align_corners) and not antialias  # with antialias it sets the scale alone
    stencil = FilterStencil(rows_in, rows_out, scale, reach, corners)

    def rows(x: PatchTensor) -> PatchTensor:
        return filtered(x, stencil, filter, antialias, resize.func)

    if rows_in == rows_out:
        return beside_rows(resize, x)
    if times * scale == 1 and times.bit_count() == 1 and not (antialias or corners):
        return enlarged(x, stencil, times, lambda part: resize(part, times), resize.func)
    if math.prod(resize.sizes) * rows_in < math.prod(x.shape[2:]) * rows_out:
        resized = rows(beside_rows(resize, wrap(x.local.to(precise(x.dtype)), x)))
    else:
        resized = beside_rows(resize, rows(x))
    return wrap(resized.local.to(x.dtype), resized)
