"""``F.pad``: rows added at the image's two edges; every other dim is padded locally."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.collectives import memory_format
from distpatch.errors import LayoutError
from distpatch.layout import EMPTY, RowLayout
from distpatch.rules.registry import crop, fetch, named, rule, wrap
from distpatch.stencil import Interval
from distpatch.tensor import PatchTensor


@rule(*named("pad"))
def pad(
    func: Any, input: PatchTensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> PatchTensor:
    pads = [*pad, *[0] * (2 * input.ndim - len(pad))]
    at = 2 * (input.ndim - 1 - input.rows.dim)
    above, below = pads[at], pads[at + 1]
    pads[at : at + 2] = 0, 0
    if above or below:
        input = _pad_rows(input, above, below, mode, value, func)
    if not any(pads):
        return input
    return wrap(_pad_local(input.local, pads[: len(pad)], mode, value), input)


def _pad_local(local: Tensor, pads: Sequence[int], mode: str, value: float | None) -> Tensor:
    """Pads that do not touch the rows. torch's non-constant modes refuse tensors without rows."""
    if mode == "constant" or local.numel() > 0:
        return F.pad(local, pads, mode, value)
    return F.pad(F.pad(local, [max(p, 0) for p in pads]), [min(p, 0) for p in pads])


def _pad_rows(x: PatchTensor, above: int, below: int, mode: str, value: float | None, func: Any) -> PatchTensor:
    """A negative pad crops, in the end: it may cut into the padding of the other edge."""
    if above <= 0 and below <= 0:
        kept = crop(x, -above, x.rows.size + below)
        form = torch.preserve_format if mode == "constant" else memory_format(x.local)
        return wrap(kept.local.clone(memory_format=form), kept)
    x = _grown(x, max(above, 0), max(below, 0), mode, value, func)
    return crop(x, max(-above, 0), x.rows.size - max(-below, 0))


def _grown(x: PatchTensor, above: int, below: int, mode: str, value: float | None, func: Any) -> PatchTensor:
    """The first rank pads above, the last below: no other row moves."""
    dim, size, last = x.rows.dim, x.rows.size, x.rows.world_size - 1
    sources = _edge_rows(size, above, below, mode)
    needs = tuple(
        (sources[0] if rank == 0 else EMPTY, sources[1] if rank == last else EMPTY) for rank in range(last + 1)
    )
    top, bottom = (x.local.narrow(dim, 0, 0),) * 2 if mode == "constant" else fetch(x, needs, func)
    if x.region.comm.rank == 0:
        top = _edge(top, dim, above, mode, value)
    if x.region.comm.rank == last:
        bottom = _edge(bottom, dim, below, mode, value)
    inner = tuple(b + above for b in x.rows.bounds[1:-1])
    layout = RowLayout(dim, (0, *inner, size + above + below))
    local = torch.cat([top, x.local, bottom], dim)
    return wrap(local.contiguous(memory_format=memory_format(x.local)), x, layout)


def _edge_rows(size: int, above: int, below: int, mode: str) -> tuple[Interval, Interval]:
    """The image rows that the padding above and below is made of."""
    most = {"constant": math.inf, "replicate": math.inf, "reflect": size - 1, "circular": size}[mode]
    if max(above, below) > most:
        raise LayoutError(f"pad of {(above, below)} rows in mode {mode!r} is too large for {size} rows")
    if mode == "reflect":
        return (1, 1 + above), (size - 1 - below, size - 1)
    if mode == "circular":
        return (size - above, size), (0, below)
    return (0, min(above, 1)), (size - min(below, 1), size)


def _edge(rows: Tensor, dim: int, count: int, mode: str, value: float | None) -> Tensor:
    """``count`` rows of padding, made of the rows of the image that the mode asks for."""
    if mode == "reflect":
        return rows.flip(dim)
    if mode == "circular":
        return rows
    shape = [count if d == dim else n for d, n in enumerate(rows.shape)]
    return rows.expand(shape) if mode == "replicate" else rows.new_full(shape, value or 0)
