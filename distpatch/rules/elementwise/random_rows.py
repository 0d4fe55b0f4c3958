"""One rank's rows of random numbers that are those of one device.

Ranks whose generators stand alike draw the numbers of the whole tensor, and keep their own rows. On a CPU they do so a
part at a time, in the order in which the whole stands in memory, so that none of them ever has the whole: its generator
gives one number after the other. On a GPU the numbers depend on how many are drawn at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from distpatch.layout.blocks import BlockLayout
from distpatch.layout.stencil import Interval, ceil_div
from distpatch.rules.core.operands import local_slice
from distpatch.rules.core.wrapping import dim_order, wrap
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.chunk_sizes import kind_of
from distpatch.torch_utils.memory_format import Order
from distpatch.torch_utils.private import no_modes

Draw = Callable[..., Tensor]  # (a tensor to fill, or to draw one like it, generator=) -> the numbers

PART = 1 << 18  # elements that are drawn at once
TOGETHER = 16  # of normal numbers a CPU makes so many at a time, and the last ones anew where some are left


def drawn_rows(draw: Draw, x: PatchTensor, dtype: torch.dtype | None = None, key: Any = None) -> Tensor:
    """This rank's rows of what ``draw`` makes of a tensor of the global shape, dense in the memory order of the rows.

    ``key``: by what is remembered whether the same numbers come in parts, which is tried once; None: they do not.
    """
    dtype, order = dtype or x.dtype, dim_order(x)
    whole = torch.compiler.is_compiling() or x.shape.numel() <= PART
    if whole or not _comes_in_parts(draw, x, dtype, order, key):
        return own_rows(draw(torch.empty_permuted(x.shape, order[::-1], dtype=dtype, device=x.device)), x)
    lo, hi = x.own_interval
    dim, places = x.row_layout.dim, order[::-1]
    row = math.prod(x.shape[d] for d in places[places.index(dim) + 1 :])  # elements, one behind the other
    block = row * x.shape[dim]
    rows: Tensor | None = None
    for start, stop in _parts(x.shape.numel(), PART):
        part = draw(torch.empty(stop - start, dtype=dtype, device=x.device))
        if rows is None:
            shape = [hi - lo if d == dim else n for d, n in enumerate(x.shape)]
            rows = torch.empty_permuted(shape, places, dtype=part.dtype, device=part.device)
            flat = rows.permute(places).view(-1)
        for i in range(start // block, ceil_div(stop, block)):
            first = i * block + lo * row  # of this rank's in the block
            a, b = max(start, first), min(stop, i * block + hi * row)
            if a < b:
                at = i * (hi - lo) * row + a - first
                flat[at : at + b - a].copy_(part[a - start : b - start])
    assert rows is not None
    return _inside(rows, x)


def own_rows(full: Tensor, x: PatchTensor) -> Tensor:
    """This rank's rows, in memory of their own: the whole tensor goes as soon as nobody holds it."""
    rows = _inside(local_slice(full, x, x.row_layout.dim), x)
    return rows.clone()


def _inside(rows: Tensor, x: PatchTensor) -> Tensor:
    """Rows that are the same on all ranks of an inner axis, sharded over it as those of ``x`` are."""
    inner = x.local_or_recipe
    if not isinstance(inner, PatchTensor) or rows.shape[inner.row_layout.dim] != inner.row_layout.size:
        return rows
    return wrap(_inside(local_slice(rows, inner, inner.row_layout.dim), inner), inner)


def _parts(numel: int, most: int) -> Iterator[Interval]:
    starts = [start for start in range(0, numel, most) if start == 0 or numel - start >= TOGETHER]
    yield from zip(starts, [*starts[1:], numel])


_known: dict[Any, bool] = {}


def _comes_in_parts(draw: Draw, x: PatchTensor, dtype: torch.dtype, order: Order, key: Any) -> bool:
    """Whether the same numbers are drawn in parts, and the generator stands alike then: tried on a few."""
    if key is None or kind_of(x.device) != "cpu" or isinstance(x.row_layout, BlockLayout):
        return False
    try:
        known = _known.get(key := (key, dtype, order))
    except TypeError:  # an argument that cannot be hashed
        return False
    if known is None:
        with no_modes(), torch.no_grad():
            known = _known[key] = _same_in_parts(draw, dtype, order)
    return known


def _same_in_parts(draw: Draw, dtype: torch.dtype, order: Order) -> bool:
    one, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    shape = [math.ceil(4 * TOGETHER ** (1 / len(order)))] * len(order)
    whole = draw(torch.empty_permuted(shape, order[::-1], dtype=dtype), generator=one)
    few = [draw(torch.empty(b - a, dtype=dtype), generator=other) for a, b in _parts(whole.numel(), 2 * TOGETHER)]
    return torch.equal(whole.permute(order[::-1]).reshape(-1), torch.cat(few)) and torch.equal(
        one.get_state(), other.get_state()
    )
