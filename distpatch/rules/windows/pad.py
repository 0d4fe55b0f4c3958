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
from distpatch.layout.stencil import Interval
from distpatch.rules.core.executor import run_rows
from distpatch.rules.core.redistribution import fetch
from distpatch.rules.core.registry import named, rule
from distpatch.rules.core.wrapping import crop, on_some_rows, wrap
from distpatch.tensor.patch_tensor import BlockTensor, PatchTensor
from distpatch.torch_utils.memory_format import memory_format
from distpatch.torch_utils.private import nn_builtins


def _keeps_format(*args: Any, **kwargs: Any) -> bool:
    return (args[2] if len(args) > 2 else kwargs.get("mode", "constant")) in {"reflect", "replicate"}


def _order_free(input: Tensor, pad: Sequence[int], *_: Any, **__: Any) -> bool:
    return isinstance(input, PatchTensor) and not any(_of_rows(input, pad))


def _adds_constants(input: Tensor, pad: Sequence[int], mode: str = "constant", *_: Any, **__: Any) -> bool:
    """Whether rows are added, all alike: where the others stand does not matter then."""
    above, below = _of_rows(input, pad) if isinstance(input, PatchTensor) else (0, 0)
    return mode == "constant" and min(above, below) >= 0 and above + below > 0


def _of_rows(input: PatchTensor, pad: Sequence[int]) -> tuple[int, int]:
    """How many rows are added above and below."""
    pads = [*pad, *[0] * (2 * input.ndim - len(pad))]
    at = 2 * (input.ndim - 1 - input.row_layout.dim)
    return pads[at], pads[at + 1]


@rule(nn_builtins.pad, asks_if_empty=True)  # Dynamo sees what F.pad calls
@rule(*named("pad"), asks_if_empty=True, keeps_format=_keeps_format, any_order=_adds_constants, order_free=_order_free)
def pad(
    func: Any, input: PatchTensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> PatchTensor:
    pads = [*pad, *[0] * (2 * input.ndim - len(pad))]
    at = 2 * (input.ndim - 1 - input.row_layout.dim)
    above, below = _of_rows(input, pad)
    if isinstance(input, BlockTensor):
        return _with_constant_rows(func, input, [*pads[:at], 0, 0, *pads[at + 2 :]], (above, below), value)
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
    may_defer = mode in {"constant", "replicate"} and not any(cut) and min(pads) >= 0
    result = _padded(input, pads, mode, value, input.row_layout.with_bounds(bounds), may_defer)
    return crop(result, cut[0], result.row_layout.size - cut[1]) if any(cut) else result


def _padded(
    x: PatchTensor, pads: Sequence[int], mode: str, value: float | None, layout: RowLayout, may_defer: bool
) -> PatchTensor:
    """At the first and last rows of the result, rows of padding; the rest padded in the other dims."""
    rows, dim = x.local_or_recipe, x.row_layout.dim
    at, size = 2 * (rows.ndim - 1 - dim), rows.shape[dim]
    above, below = pads[at : at + 2] if len(pads) > at else (0, 0)
    shape = list(rows.shape)
    for d, (before, after) in enumerate(zip(pads[::2], pads[1::2]), 1):
        shape[-d] += before + after
    least = 1 + max(above, below) if mode == "reflect" else 1  # rows that padding may be made of

    def need(lo: int, hi: int) -> Interval:
        return max(min(lo - above, size - least), 0), min(max(hi - above, least), size)

    def pad_part(parts: Sequence[Tensor], spare: Sequence[Tensor], lo: int, hi: int) -> Tensor:
        start, stop = need(lo, hi)
        own = list(pads)
        if above or below:
            own[at : at + 2] = max(start + above - lo, 0), max(hi - above - stop, 0)
        result = F.pad(parts[0], own, mode, value)
        return result if result.shape[dim] == hi - lo else result.narrow(dim, lo - (start + above - own[at]), hi - lo)

    return run_rows("pad", [x], pad_part, need=need, shape=shape, layout=layout, may_defer=may_defer)


def _with_constant_rows(
    func: Any, x: BlockTensor, others: Sequence[int], counts: tuple[int, int], value: float | None
) -> PatchTensor:
    """Rows that stay where they are, padded along other dims, between such as are replicated."""
    dim = x.row_layout.dim
    x = wrap(on_some_rows(lambda rows: func(rows, others, "constant", value), x.local, dim), x)  # type: ignore[assignment]
    sizes = [[n if d == dim else size for d, size in enumerate(x.shape)] for n in counts]
    above, below = (torch.full(size, value or 0, dtype=x.dtype, device=x.device) for size in sizes)
    padded: PatchTensor = torch.cat([above, x, below], dim)  # type: ignore[assignment]
    return padded


def _have_edges(rows: RowLayout, above: int, below: int, mode: str) -> bool:
    """Whether the first and the last rank own what the padding above and below is made of."""
    if mode == "constant" or above == below == 0:
        return True
    held = (above, rows.bounds[1]), (below, rows.size - rows.bounds[-2])
    return mode != "circular" and all(pad == 0 or (pad < own if mode == "reflect" else own > 0) for pad, own in held)


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
