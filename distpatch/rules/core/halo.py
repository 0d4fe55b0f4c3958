"""This rank's rows with the rows that a stencil reads above and below them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distpatch.comm import collectives
from distpatch.comm.row_exchange import fetch_rows
from distpatch.layout.rows import Needs, RowLayout, Stencil
from distpatch.layout.stencil import Interval, ceil_div
from distpatch.layout.transfers import plan_edges, plan_stencil
from distpatch.lazy.row_patches import Slab, fewest_calls
from distpatch.rules.core.operands import fetch, joined, wrap
from distpatch.rules.core.registry import none_of
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors


def fetch_edges(x: PatchTensor, needs: Needs, func: Any) -> list[Tensor]:
    """As ``fetch`` of rows that are all other ranks' own; of rows that wait, only those are computed."""
    plan, dim, recipe = plan_edges(x.row_layout.bounds, needs), x.row_layout.dim, x.as_recipe
    strips = [recipe.evaluate(lo, hi) for lo, hi in plan.strips[x.region.comm.rank]]
    edges = torch.cat(strips, dim) if strips else recipe.sample()
    return fetch_rows(edges, dim, plan.bounds, plan.needs, x.region.comm.name, op_name(func), True)


def halo(x: PatchTensor, needs: Needs, func: Any, fill: float = 0.0, wait: bool = False) -> Slab:
    """This rank's rows with the rows that it needs above and below them; beyond the image, ``fill``.

    ``wait``: without computing the rank's own, if they wait (inference only).
    """
    dim, rank = x.row_layout.dim, x.region.comm.rank
    own: Any
    if wait:
        above, below = fetch_edges(x, needs, func)  # no views of the rank's own: somebody may write over these
        own = x.as_recipe
    else:
        above, below = fetch(x, needs, func, channels_last=True)
        own = collectives.anchor_in_graph(x.local, above, below)
    (top, _), (bottom, _) = needs[rank]
    pieces = ((top, above), (x.row_layout.bounds[rank], own), (bottom, below))
    return Slab(pieces, 1, dim, x.row_layout.size, fill)


def slab_of(x: PatchTensor, stencil: Stencil, func: Any, fill: float = 0.0) -> tuple[Slab, Interval, RowLayout]:
    """What a stencil reads on this rank, the output rows that the rank owns, and the output's layout."""
    plan, rank = plan_stencil(x.row_layout.bounds, stencil), x.region.comm.rank
    out = plan.out[rank], plan.out[rank + 1]
    return halo(x, plan.needs, func, fill), out, x.row_layout.with_bounds(plan.out)


def run_stencil(
    compute: Callable[[Tensor, int, int, int], Any],
    x: PatchTensor,
    stencil: Stencil,
    func: Any,
    fill: float = 0.0,
    view: bool = False,
    growth: int = 1,
) -> Any:
    """``compute(rows, start, lo, hi)``: output rows [lo, hi) of a stencil, from all the input rows that
    they read, the first of them ``start``. Returns what it returns, one tensor or several, sharded.

    An idle rank computes the first output row of a blank image, and keeps none. More elements than kernels can
    index are computed in parts, unless the result is a ``view``; ``growth``: how many times longer a row becomes.
    """
    slab, (lo, hi), layout = slab_of(x, stencil, func, fill)
    if lo < hi:
        own = x.local.shape[slab.dim]
        largest = x.local.numel() * max(growth * (hi - lo), own) // max(own, 1)
        step = hi - lo if view else ceil_div(hi - lo, fewest_calls(largest))
        parts = []
        for a in range(lo, hi, step):
            start, stop = stencil.need(a, min(a + step, hi))
            parts.append(compute(slab.rows(start, stop), start, a, min(a + step, hi)))
        result = parts[0] if len(parts) == 1 else joined(parts, slab.dim)
    else:
        start, stop = stencil.need(0, 1)
        result = compute(slab.blank(stop - start), start, 0, 1)
        result = none_of(result, slab.dim)
    return map_tensors(lambda t: wrap(t, x, layout), result)
