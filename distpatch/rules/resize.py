"""Resizing over the sharded dim: every mode of ``interpolate``, by size and by factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.rules.fallback import fallback
from distpatch.rules.registry import named, on_some_rows, over_rows, per_dim, rule, wrap
from distpatch.rules.resample import FILTERS, enlarged, filtered, precise
from distpatch.stencil import FilterStencil, NearestStencil
from distpatch.tensor import PatchTensor

NEAREST = ("nearest", "nearest-exact")


@rule(*named("interpolate"))
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
    spatial, dim, axis = input.ndim - 2, input.rows.dim, input.rows.dim - 2
    if axis < 0:  # whole images, or whole channels
        local = on_some_rows(lambda part: func(part, size, scale_factor, *how), input.local, dim)
        return wrap(local, input)
    shape, known = input.shape[2:], mode in (*NEAREST, "area") or (mode, spatial, antialias) in FILTERS
    factors = None if scale_factor is None else per_dim(scale_factor, spatial)
    sizes = per_dim(size, spatial) if factors is None else [int(n * f) for n, f in zip(shape, factors)]
    if not known or (size is None) != (factors is not None) or (size and recompute_scale_factor) or 0 in sizes:
        return fallback(func, input, size, scale_factor, *how)  # torch says what is wrong
    if mode == "area":
        return getattr(F, f"adaptive_avg_pool{spatial}d")(input, sizes)
    rows_in, rows_out = shape[axis], sizes[axis]
    if recompute_scale_factor:
        factors = None
    if align_corners:
        scale = (rows_in - 1) / max(rows_out - 1, 1) if rows_out > 1 else 0.0
    else:
        scale = rows_in / rows_out if factors is None else 1 / factors[axis]

    def resize(part: Tensor, times: int = 1) -> Tensor:
        """Torch's own on these rows, making ``times`` rows of each."""
        if factors is not None:
            changed = tuple(times if d == axis else factor for d, factor in enumerate(factors))
            return func(part, None, changed, mode, align_corners, None, antialias)
        changed = tuple(part.shape[dim] * times if d == axis else n for d, n in enumerate(sizes))
        return func(part, changed, None, mode, align_corners, None, antialias)

    if mode in NEAREST:
        nearest = NearestStencil(rows_in, rows_out, scale, spatial == 2, mode == "nearest-exact")
        x, times = (_pick(input, nearest, func), 1) if nearest.repeats is None else (input, nearest.repeats)
        layout = x.rows.with_bounds(tuple(times * bound for bound in x.rows.bounds))
        return wrap(on_some_rows(lambda part: resize(part, times), x.local, dim), input, layout)
    filter = FILTERS[mode, spatial, antialias]
    widened = filter.reach * (max(scale, 1.0) if antialias else 1.0)
    stencil = FilterStencil(rows_in, rows_out, scale, widened, bool(align_corners) and not antialias)

    def resize_columns(x: PatchTensor) -> PatchTensor:
        return wrap(on_some_rows(resize, x.local, dim), x)

    def resize_rows(x: PatchTensor) -> PatchTensor:
        return filtered(x, stencil, filter, antialias, func)

    if rows_in == rows_out and (scale == 1 or (filter.reach == 1 and not antialias)):
        return resize_columns(input)
    times = rows_out // rows_in
    if times * scale == 1 and times.bit_count() == 1 and not (antialias or align_corners):
        return enlarged(input, stencil, times, lambda part: resize(part, times), func)
    if math.prod(sizes) * rows_in < math.prod(shape) * rows_out:  # the other dims become smaller
        x = resize_rows(resize_columns(wrap(input.local.to(precise(input.dtype)), input)))
    else:
        x = resize_columns(resize_rows(input))
    return wrap(x.local.to(input.dtype), x)


def _pick(x: PatchTensor, stencil: NearestStencil, func: Any) -> PatchTensor:
    """The source row of each output row."""

    def pick(rows: Tensor, start: int, lo: int, hi: int) -> Tensor:
        out = torch.arange(lo, hi, device=rows.device, dtype=torch.float32) + 0.5 * stencil.exact
        source = (out * stencil.scale).long().clamp(max=stencil.rows_in - 1)
        return rows.index_select(x.rows.dim, source - start)

    return over_rows(pick, x, stencil, func)
