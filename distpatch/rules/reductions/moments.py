"""Means and variances of rows, merged over ranks; what norms take them over.

Never E[x²] - E[x]²: centred moments are merged by Chan's formula (``comm/merging.py``). Small tensors are in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.collectives import stack_ranks
from distpatch.comm.merging import merge_deviations, merge_moments
from distpatch.comm.moments_exchange import Strips, gather_moments
from distpatch.layout.rows import RowLayout
from distpatch.layout.stencil import Interval
from distpatch.lazy.recipe import Recipe
from distpatch.lazy.row_patches import patches_to_run
from distpatch.rules.core.operands import needs_grad
from distpatch.tensor.patch_tensor import BlockTensor, PatchTensor
from distpatch.torch_utils.chunk_sizes import sizes_of
from distpatch.torch_utils.constants import constant
from distpatch.torch_utils.private import foreach_copy


def moments(
    local: Tensor | Recipe, dims: tuple[int, ...], along: int, op: str, exact: bool = False, groups: int = 0
) -> tuple[int, Tensor, Tensor]:
    """Count, mean and centred second moment over ``dims``, which stay as dims of size 1, in fp64.

    Taken around a rounded mean, in fp32 or better, and corrected: where the mean is a thousand deviations
    from 0, its rounding alone is as large as torch's whole error. On devices without a large cache in one reading
    by Welford's update, with torch's error. ``exact``: squares are added in fp64, for a variance that somebody sees,
    in either case around the mean. Without gradients in chunks of rows of the dim ``along``, one of ``dims``.
    ``groups``: of dim 1, which is two then, as ``dims`` count. Of rows that are sharded over an inner axis each of its
    ranks takes its own, which are merged in one collective, named after ``op``.
    """
    precise, double = torch.promote_types(local.dtype, torch.float32), _double(local)
    sizes = sizes_of(local.device)
    if isinstance(local, Recipe) and local.value is not None:
        local = local.value
    grads = isinstance(local, Tensor) and needs_grad(local)
    if isinstance(local, PatchTensor) and not grads:
        layout, shape = local.row_layout, list(local.shape)
        if groups:
            shape[1:2] = [groups, shape[1] // groups]
        at = layout.dim + (len(shape) - local.ndim if layout.dim > 1 else 0)
        if at in dims:
            _, mean, m2 = moments(local.local, dims, along, op, exact, groups)
            a_row = math.prod(shape[d] for d in dims if d != at)
            return merge_ranks(layout, a_row, mean, m2, local.comm.name, op)
    whole = grads or torch.compiler.is_compiling()  # a compiler makes its own chunks
    whole = whole or isinstance(local, BlockTensor)  # of an inner axis, of which some would have to be in order
    rows = local.shape[along]
    intervals = _intervals(rows, rows if whole else _rows_of_a_reading(local, along))
    at_once = not (grads or exact or sizes.reads_twice) and local.shape.numel() > 0
    counts: list[int] = []
    found: list[tuple[Tensor, ...]] = []
    for lo, hi in patches_to_run(intervals):
        chunk = local.evaluate(lo, hi) if isinstance(local, Recipe) else _narrowed(local, along, lo, hi)
        chunk = chunk.unflatten(1, (groups, -1)) if groups else chunk
        counts.append(math.prod(chunk.shape[d] for d in dims))
        if at_once:
            found.append(torch.var_mean(chunk.to(precise), dims, correction=0, keepdim=True))
        else:
            found.append(_around_rounded_mean(chunk, dims, counts[-1], precise, double if exact else None, grads))
    parts = [t.to(double) for t in (found[0] if len(found) == 1 else map(torch.stack, zip(*found, strict=True)))]
    count = _as_factor(counts, parts[0])
    if at_once:
        mean, m2 = parts[1], parts[0] * count
    else:
        middle, rest, squares = parts
        mean, m2 = middle + rest / count, squares - rest.square() / count
    return (counts[0], mean, m2) if len(found) == 1 else merge_moments(counts, mean, m2)


def _around_rounded_mean(
    rows: Tensor, dims: tuple[int, ...], count: int, precise: torch.dtype, summed: torch.dtype | None, grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A rounded mean, and the sums of the differences from it and of their squares, which correct it."""
    middle = rows.detach().sum(dims, keepdim=True, dtype=precise) / max(count, 1)
    centred = rows - middle
    rest = centred.sum(dims, keepdim=True)
    return middle, rest, (centred.square() if grads else centred.square_()).sum(dims, keepdim=True, dtype=summed)


def _as_factor(counts: list[int], like: Tensor) -> Tensor | int:
    """Of what is stacked along dim 0, or of one; no 0."""
    if min(counts) == max(counts):
        return max(counts[0], 1)
    return constant(_column, tuple(counts), like.ndim, like=like)


def _column(counts: Sequence[int], ndim: int) -> list[Any]:
    nested: list[Any] = [max(count, 1) for count in counts]
    for _ in range(ndim - 1):
        nested = [[inner] for inner in nested]
    return nested


def _narrowed(rows: Tensor, dim: int, lo: int, hi: int) -> Tensor:
    return rows if (lo, hi) == (0, rows.shape[dim]) else rows.narrow(dim, lo, hi - lo)


def _deviation_and_mean(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of each group of channels of each sample, (B, groups), in fp32 or better, in one kernel."""
    if rows.dtype.itemsize < 4:
        rows = rows.float()
    batch, channels, *sizes = rows.shape
    grouped = rows.view(batch, groups, channels // groups, *sizes)
    return torch.std_mean(grouped, list(range(2, grouped.ndim)), correction=0)


def _double(like: Tensor | Recipe) -> torch.dtype:
    """fp64, but on devices that have none."""
    return torch.float64 if like.device.type != "mps" else torch.promote_types(like.dtype, torch.float32)


def _rows_of_a_reading(local: Tensor | Recipe, along: int) -> int:
    row_bytes = local.shape.numel() // max(local.shape[along], 1) * local.dtype.itemsize
    return sizes_of(local.device).statistics_bytes // max(row_bytes, 1)


def _intervals(size: int, rows: int) -> list[Interval]:
    """All rows, so many at a time; one interval, where there are none."""
    return [(lo, min(lo + max(rows, 1), size)) for lo in range(0, size, max(rows, 1))] or [(0, 0)]


def merge_ranks(
    layout: RowLayout, a_row: int, mean: Tensor, m2: Tensor, name: str, op: str
) -> tuple[int, Tensor, Tensor]:
    """The moments of all ranks' rows, in one collective; each row has ``a_row`` samples."""
    counts: Sequence[int] = [a_row * height for height in layout.heights]
    if len(counts) == 1:
        return counts[0], mean, m2
    ranks = stack_ranks(torch.stack([mean, m2]), name, op)
    return merge_moments(counts, ranks[:, 0], ranks[:, 1])


@dataclass(frozen=True)
class Norm:
    """What a normalisation of (B, C, ..., rows, ...) takes its statistics over.

    ``groups``: of channels, each of each sample; 0: each channel over the whole batch, which alone may be
    sharded along dim 0. ``rows``: the tensor's layout; ``name``: the communicator's.
    """

    groups: int
    eps: float
    row_layout: RowLayout
    name: str
    op: str

    def __post_init__(self) -> None:
        if self.eps < 0:  # here, since idle ranks would not notice
            raise ValueError(f"{self.op}: eps must not be negative, but is {self.eps}")

    def statistics(self, local: Tensor | Recipe, strips: Strips | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean and ``sqrt(variance + eps)``, (B, groups) or (1, C), replicated, in fp64; with derivatives if needed.

        And, without gradients, the rows of others that come with them (``gather_moments``).
        """
        layout, a_row = self.row_layout, self._a_row(local)
        counts: Sequence[int]
        rows = None
        if torch.compiler.is_compiling() or (isinstance(local, Tensor) and needs_grad(local)):
            _, mean, m2 = self._moments(local)
            if strips is None:
                count, mean, m2 = merge_ranks(layout, a_row, mean, m2, self.name, self.op)
            else:
                counts = [a_row * height for height in layout.heights]
                counts, parts, rows = gather_moments(counts, (mean, m2), mean.dtype, self.name, self.op, strips)
                count, mean, m2 = merge_moments(counts, parts[:, 0], parts[:, 1])
            return mean, (m2 / max(count, 1) + self.eps).sqrt(), rows
        counts, moments = self._parts(local)
        if layout.world_size > 1:
            own = moments if len(counts) == 1 else merge_deviations(counts, _packed(moments), 0.0)
            counts = [a_row * height for height in layout.heights]
            if self.groups:
                counts, parts, rows = gather_moments(counts, own, _double(local), self.name, self.op, strips)
            else:
                parts = stack_ranks(_packed(own)[0], self.name, self.op)
        else:
            parts = _packed(moments)
        return *merge_deviations(counts, parts, self.eps), rows

    def _moments(self, local: Tensor | Recipe) -> tuple[int, Tensor, Tensor]:
        exact, along = self._is_seen(local), max(self.row_layout.dim, 2)
        if not self.groups:
            count, mean, m2 = moments(local, (0, *range(2, local.ndim)), along, self.op, exact)
        elif sizes_of(local.device).reads_twice:  # a sum over channels too is slow there, above all of channels last
            count, *channels = moments(local, tuple(range(2, local.ndim)), along, self.op, exact)
            members = [t.flatten(1).unflatten(1, (self.groups, -1)).movedim(2, 0) for t in channels]
            count, mean, m2 = merge_moments([count] * len(members[0]), *members)
        else:
            count, mean, m2 = moments(local, tuple(range(2, local.ndim + 1)), along, self.op, exact, self.groups)
        return count, mean.flatten(1), m2.flatten(1)

    def _parts(self, local: Tensor | Recipe) -> tuple[Sequence[int], Sequence[Tensor]]:
        """How many samples parts of this rank's rows have, and the mean and the deviation of each."""
        if isinstance(local, Recipe) and local.value is not None:
            local = local.value
        alone = isinstance(local, PatchTensor) or not local.shape.numel()
        if alone or sizes_of(local.device).reads_twice or self._is_seen(local):
            count, mean, m2 = self._moments(local)
            return [count], [mean, (m2 / max(count, 1)).clamp_(min=0).sqrt_()]
        along, a_row = max(self.row_layout.dim, 2), self._a_row(local)
        rows, at_once = local.shape[along], _rows_of_a_reading(local, along)
        counts, found = [], []
        for lo, hi in patches_to_run(_intervals(rows, at_once) if at_once < rows else [(0, rows)]):
            if isinstance(local, Recipe):
                chunk = local.evaluate(lo, hi)
            else:
                chunk = local if hi - lo == rows else local.narrow(along, lo, hi - lo)
            deviation, mean = _deviation_and_mean(chunk, self.groups)
            found += [mean, deviation]
            counts.append((hi - lo) * a_row)
        return counts, found

    def _is_seen(self, local: Tensor | Recipe) -> bool:
        """Whether the variance may be somebody's, who keeps it."""
        return self.groups in {0, local.shape[1]}

    def variance(self, spread: Tensor) -> Tensor:
        return spread.square() - self.eps

    def count(self, local: Tensor | Recipe) -> int:
        """Samples of one statistic, on all ranks together."""
        return self._a_row(local) * self.row_layout.size

    def _a_row(self, local: Tensor | Recipe) -> int:
        shape = local.shape
        if torch.compiler.is_compiling():
            return _samples_of_a_row.__wrapped__(shape, self.row_layout.dim, self.groups)
        return _samples_of_a_row(shape, self.row_layout.dim, self.groups)

    def sums(self, per_channel: Tensor) -> Tensor:
        """(B or 1, C) summed over each group, at every channel."""
        if not self.groups:
            return per_channel
        channels = per_channel.shape[1]
        return of_channels(per_channel.unflatten(1, (self.groups, -1)).sum(2), channels)


def _packed(moments: Sequence[Tensor]) -> Tensor:
    """Mean and deviation of each part, (K, 2, ...)."""
    shape = moments[0].shape
    if isinstance(moments[0], PatchTensor):  # over an inner axis
        return torch.stack([t.to(_double(t)) for t in moments]).unflatten(0, (-1, 2))
    parts = torch.empty((len(moments), *shape), dtype=_double(moments[0]), device=moments[0].device)
    foreach_copy(parts.unbind(0), list(moments))
    return parts.view(-1, 2, *shape)


@lru_cache(maxsize=4096)
def _samples_of_a_row(shape: torch.Size, dim: int, groups: int) -> int:
    others = [n for d, n in enumerate(shape) if d not in (1, dim) and (d or not groups)]
    return math.prod(others) * (shape[1] // groups if groups else 1)


def of_channels(t: Tensor, channels: int) -> Tensor:
    """(B, groups) at every channel: (B, C)."""
    return t if t.shape[1] == channels else t.repeat_interleave(channels // t.shape[1], 1)
