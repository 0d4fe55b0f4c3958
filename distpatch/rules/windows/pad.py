"""``F.pad``: rows added at the image's two edges; every other dim is padded locally."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.errors import LayoutError
from distpatch.layout.rows import EMPTY, RowLayout
from distpatch.layout.stencil import Interval, ceil_div
from distpatch.lazy.deferred_ops import defer_stencil
from distpatch.lazy.recipe import Recipe
from distpatch.lazy.row_patches import fewest_calls
from distpatch.rules.core.operands import can_defer, crop, fetch, materialize_if_costly, on_some_rows, wrap
from distpatch.rules.core.registry import named, rule
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.memory_format import memory_format


def _keeps_format(*args: Any, **kwargs: Any) -> bool:
    return (args[2] if len(args) > 2 else kwargs.get("mode", "constant")) in {"reflect", "replicate"}


@rule(torch._C._nn.pad, asks_if_empty=True)  # Dynamo sees what F.pad calls
@rule(*named("pad"), asks_if_empty=True, keeps_format=_keeps_format)
def pad(
    func: Any, input: PatchTensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> PatchTensor:
    pads = [*pad, *[0] * (2 * input.ndim - len(pad))]
    at = 2 * (input.ndim - 1 - input.row_layout.dim)
    above, below = pads[at : at + 2]
    if mode == "circular" or (above <= 0 and below <= 0):
        input, cut = crop(input, max(-above, 0), input.row_layout.size - max(-below, 0)), (0, 0)
    else:  # in the end: a negative pad may cut into the padding of the other edge
        cut = max(-above, 0), max(-below, 0)
    above, below = max(above, 0), max(below, 0)
    if not _have_edges(input.row_layout, above, below, mode):
        input, above, below = _pad_rows(input, above, below, mode, func), 0, 0
    bounds = (0, *(b + above for b in input.row_layout.bounds[1:-1]), input.row_layout.size + above + below)
    rank, last = input.region.comm.rank, input.row_layout.world_size - 1
    pads[at : at + 2] = above if rank == 0 else 0, below if rank == last else 0
    pads = pads[: len(pad)]
    if mode in {"constant", "replicate"} and not any(cut) and min(pads) >= 0 and can_defer(input):
        return wrap(
            _defer_pad(materialize_if_costly(input).as_recipe, pads, mode, value),
            input,
            input.row_layout.with_bounds(bounds),
        )
    result = wrap(_pad_local(input.local, pads, mode, value, at), input, input.row_layout.with_bounds(bounds))
    return crop(result, cut[0], result.row_layout.size - cut[1]) if any(cut) else result


def _defer_pad(rows: Recipe, pads: Sequence[int], mode: str, value: float | None) -> Recipe:
    """When it is asked for: at the first and last rows of the result, rows of padding."""
    at = 2 * (rows.ndim - 1 - rows.dim)
    above, below = pads[at : at + 2] if len(pads) > at else (0, 0)
    shape = [n + sum(pads[2 * (rows.ndim - 1 - d) :][:2]) for d, n in enumerate(rows.shape)]
    last = max(rows.num_rows - 1, 0)

    def need(lo: int, hi: int) -> Interval:
        """One row at least: padding may be made of it."""
        return min(max(lo - above, 0), last), min(max(hi - above, 1), rows.num_rows)

    def pad_part(part: Tensor, lo: int, hi: int) -> Tensor:
        start, stop = need(lo, hi)
        own = list(pads)
        if above or below:
            own[at : at + 2] = max(start + above - lo, 0), max(hi - above - stop, 0)
        result = F.pad(part, own, mode, value)
        return result.narrow(rows.dim, lo - (start + above - own[at]), hi - lo) if above or below else result

    return defer_stencil("pad", rows, need, pad_part, shape)


def _have_edges(rows: RowLayout, above: int, below: int, mode: str) -> bool:
    """Whether the first and the last rank own what the padding above and below is made of."""
    if mode == "constant" or above == below == 0:
        return True
    held = (above, rows.bounds[1]), (below, rows.size - rows.bounds[-2])
    return mode != "circular" and all(pad == 0 or (pad < own if mode == "reflect" else own > 0) for pad, own in held)


def _pad_local(local: Tensor, pads: Sequence[int], mode: str, value: float | None, at: int) -> Tensor:
    """Always a copy, and one. torch's non-constant modes refuse tensors without rows, and index with 32 bits."""
    dim, calls = local.ndim - 1 - at // 2, 1 if mode == "constant" else fewest_calls(local.numel())
    if calls > 1:
        parts = local.split(ceil_div(local.shape[dim], calls), dim)
        edges = [[*pads] for _ in parts]
        for k, own in enumerate(edges):
            if len(own) > at:
                own[at : at + 2] = own[at] if k == 0 else 0, own[at + 1] if k == len(parts) - 1 else 0
        return torch.cat([F.pad(part, own, mode, value) for part, own in zip(parts, edges)], dim)
    if mode == "constant":
        return F.pad(local, pads, mode, value)
    return on_some_rows(lambda rows: F.pad(rows, pads, mode, value), local, dim)


def _pad_rows(x: PatchTensor, above: int, below: int, mode: str, func: Any) -> PatchTensor:
    """The first rank pads above, the last below: no other row moves."""
    dim, size, last = x.row_layout.dim, x.row_layout.size, x.row_layout.world_size - 1
    sources = _edge_rows(size, above, below, mode)
    needs = tuple(
        (sources[0] if rank == 0 else EMPTY, sources[1] if rank == last else EMPTY) for rank in range(last + 1)
    )
    top, bottom = fetch(x, needs, func)
    if x.region.comm.rank == 0:
        top = _edge(top, dim, above, mode)
    if x.region.comm.rank == last:
        bottom = _edge(bottom, dim, below, mode)
    inner = tuple(b + above for b in x.row_layout.bounds[1:-1])
    layout = RowLayout(dim, (0, *inner, size + above + below))
    local = torch.cat([top, x.local, bottom], dim)
    return wrap(local.contiguous(memory_format=memory_format(x.local)), x, layout)


def _edge_rows(size: int, above: int, below: int, mode: str) -> tuple[Interval, Interval]:
    """The image rows that the padding above and below is made of."""
    most = {"replicate": math.inf, "reflect": size - 1, "circular": size}[mode]
    if max(above, below) > most:
        raise LayoutError(f"pad of {(above, below)} rows in mode {mode!r} is too large for {size} rows")
    if mode == "reflect":
        return (1, 1 + above), (size - 1 - below, size - 1)
    if mode == "circular":
        return (size - above, size), (0, below)
    return (0, min(above, 1)), (size - min(below, 1), size)


def _edge(rows: Tensor, dim: int, count: int, mode: str) -> Tensor:
    """``count`` rows of padding, made of the rows of the image that the mode asks for."""
    if mode == "reflect":
        return rows.flip(dim)
    if mode == "circular":
        return rows
    return rows.expand([count if d == dim else n for d, n in enumerate(rows.shape)])
