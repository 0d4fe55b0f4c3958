"""Resizing over the sharded dim. Nearest neighbour reads one row for each of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.layout import RowLayout, plan_stencil
from distpatch.patch_conv import Slab
from distpatch.rules.fallback import fallback
from distpatch.rules.registry import halo, named, on_some_rows, per_dim, rule, wrap
from distpatch.stencil import NearestStencil
from distpatch.tensor import PatchTensor


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
    axis, spatial = input.rows.dim - 2, input.ndim - 2
    if mode != "nearest" or axis < 0 or (size is None) == (scale_factor is None):
        how = (mode, align_corners, recompute_scale_factor, antialias)
        return fallback(func, input, size, scale_factor, *how)
    rows = input.shape[2:]
    if size is not None:
        factors, sizes = None, per_dim(size, spatial)
    else:
        factors = per_dim(scale_factor, spatial)
        sizes = tuple(int(n * f) for n, f in zip(rows, factors, strict=True))
    if factors is None or recompute_scale_factor:
        factors, scale = None, rows[axis] / sizes[axis]
    else:
        scale = 1 / factors[axis]
    stencil = NearestStencil(rows[axis], sizes[axis], scale, short_cuts=spatial == 2)
    plan, dim = plan_stencil(input.rows.bounds, stencil), input.rows.dim
    layout = RowLayout(dim, plan.out)
    repeats, rest = divmod(sizes[axis], rows[axis])
    local = input.local
    if rest or scale * repeats != 1:  # not each row so many times: pick the source of each output row
        lo, hi = layout.interval(input.region.comm.rank)
        local, repeats = _pick(halo(input, plan.needs, func), [stencil.source(o) for o in range(lo, hi)]), 1

    def resize(part: Tensor) -> Tensor:
        if factors is not None:
            return func(part, None, tuple(repeats if d == axis else f for d, f in enumerate(factors)))
        return func(part, tuple(part.shape[dim] * repeats if d == axis else n for d, n in enumerate(sizes)))

    return wrap(on_some_rows(resize, local, dim), input, layout)


def _pick(slab: Slab, sources: list[int]) -> Tensor:
    """These global rows, one after another."""
    if not sources:
        return slab.own[2].narrow(slab.dim, 0, 0)
    first = sources[0]
    rows = slab.rows(first, sources[-1] + 1)
    index = torch.tensor([source - first for source in sources], device=rows.device)
    return rows.index_select(slab.dim, index)
