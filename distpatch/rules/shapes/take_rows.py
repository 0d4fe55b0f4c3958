"""Rows chosen by a replicated tensor of numbers, along the sharded dim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distpatch.layout.rows import EMPTY, Needs, RowLayout, even_bounds
from distpatch.rules.core.operands import fetch, wrap
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.private import FakeTensor


def rows_by_number(x: PatchTensor, numbers: Tensor, func: Any) -> PatchTensor:
    """``x.index_select(dim, numbers)`` along the sharded dim; ``numbers``: (n,), the same on every rank.

    Numbers that the host has say which rows a rank needs: one exchange. Those that only the device has are not
    read: each rank's rows are shown to all, one rank after the other. Raises ``IndexError`` as torch does.
    """
    dim, size, rank = x.row_layout.dim, x.row_layout.size, x.rank
    layout = (
        x.row_layout if len(numbers) == size else RowLayout(dim, even_bounds(len(numbers), x.row_layout.world_size))
    )
    lo, hi = layout.interval(rank)
    if not _readable(numbers):
        own = torch.where(numbers < 0, numbers + size, numbers)[lo:hi]
        return wrap(shown_in_turn(x, own, lambda rows, at: rows.index_select(dim, at), func), x, layout)
    known = numbers.tolist()
    if any(not -size <= n < size for n in known):
        raise IndexError(f"{op_name(func)}: index {known} is out of bounds for dimension {dim} with size {size}")
    needs = _intervals([n % size for n in known], layout.bounds)
    rows = fetch(x, needs, func)[0]
    return wrap(rows.index_select(dim, numbers[lo:hi].long() % max(size, 1) - needs[rank][0][0]), x, layout)


def _readable(numbers: Tensor) -> bool:
    """Whether the host can read them without waiting for a device."""
    return numbers.device.type == "cpu" and not isinstance(numbers, FakeTensor)


def _intervals(numbers: Sequence[int], bounds: Sequence[int]) -> Needs:
    """For every rank the rows from the first to the last that it needs."""
    own = (numbers[lo:hi] for lo, hi in pairwise(bounds))
    return tuple(((min(some), max(some) + 1) if some else EMPTY,) for some in own)


def shown_in_turn(x: PatchTensor, numbers: Tensor, pick: Callable[[Tensor, Tensor], Tensor], func: Any) -> Tensor:
    """``pick(rows, numbers)`` where only the device knows the numbers: each rank's rows are shown to all in turn.

    A number out of range stays as it is, so that torch refuses it as it does on one device.
    """
    dim, world, size = x.row_layout.dim, x.row_layout.world_size, x.row_layout.size
    elsewhere = torch.where((numbers >= 0) & (numbers < size), 0, numbers)
    shape = numbers.shape if numbers.ndim == x.ndim else [len(numbers) if d == dim else 1 for d in range(x.ndim)]
    found: Tensor | None = None
    for lo, hi in pairwise(x.row_layout.bounds):
        if lo < hi:
            rows = fetch(x, (((lo, hi),),) * world, func)[0]
            here = (numbers >= lo) & (numbers < hi)
            part = pick(rows, torch.where(here, numbers - lo, elsewhere))
            found = part if found is None else torch.where(here.view(shape), part, found)
    return pick(x.local, numbers) if found is None else found
