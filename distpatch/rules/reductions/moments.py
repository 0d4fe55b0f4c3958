"""Means and variances of rows, merged over ranks; what norms take them over, and their gradient.

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

from distpatch.comm.collectives import gather_moments, replicated_operand, stack_ranks, sum_partials
from distpatch.comm.merging import merge_deviations, merge_moments
from distpatch.layout.rows import RowLayout
from distpatch.layout.stencil import Interval
from distpatch.lazy.deferred_ops import Step
from distpatch.lazy.recipe import Recipe
from distpatch.lazy.row_patches import format_of_rows, patches_to_run, rows_now
from distpatch.rules.core.executor import deferrable, run_rows
from distpatch.rules.core.operands import needs_grad, wrap
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.chunk_sizes import sizes_of
from distpatch.torch_utils.memory_format import memory_format
from distpatch.torch_utils.private import foreach_copy


def moments(
    local: Tensor | Recipe, dims: tuple[int, ...], along: int, exact: bool = False, groups: int = 0
) -> tuple[int, Tensor, Tensor]:
    """Count, mean and centred second moment over ``dims``, which stay as dims of size 1, in fp64.

    Taken around a rounded mean, in fp32 or better, and corrected: where the mean is a thousand deviations
    from 0, its rounding alone is as large as torch's whole error. On devices without a large cache in one reading
    by Welford's update, with torch's error. ``exact``: squares are added in fp64, for a variance that somebody sees,
    in either case around the mean. Without gradients in chunks of rows of the dim ``along``, one of ``dims``.
    ``groups``: of dim 1, which is two then, as ``dims`` count.
    """
    precise, double = torch.promote_types(local.dtype, torch.float32), _double(local)
    sizes = sizes_of(local.device)
    if isinstance(local, Recipe) and local.value is not None:
        local = local.value
    grads = isinstance(local, Tensor) and needs_grad(local)
    whole = grads or torch.compiler.is_compiling()  # a compiler makes its own chunks
    rows = local.shape[along]
    intervals = _intervals(rows, rows if whole else _rows_of_a_reading(local, along))
    counts, means, m2s = [], [], []
    for lo, hi in patches_to_run(intervals):
        chunk = local.evaluate(lo, hi) if isinstance(local, Recipe) else local.narrow(along, lo, hi - lo)
        chunk = chunk.unflatten(1, (groups, -1)) if groups else chunk
        count = math.prod(chunk.shape[d] for d in dims)
        counts.append(count)
        if count and not grads and not exact and not sizes.reads_twice:
            var, mean = torch.var_mean(chunk.to(precise), dims, correction=0, keepdim=True)
            m2s.append(var.to(double) * count)
            means.append(mean.to(double))
            continue
        middle = chunk.detach().sum(dims, keepdim=True, dtype=precise) / max(count, 1)
        centred = chunk - middle
        rest = centred.sum(dims, keepdim=True) / max(count, 1)
        squared = centred.square() if grads else centred.square_()
        m2s.append(
            squared.sum(dims, keepdim=True, dtype=double if exact else None).to(double)
            - count * rest.to(double).square()
        )
        means.append(middle.to(double) + rest)
    if len(counts) == 1:
        return counts[0], means[0], m2s[0]
    return merge_moments(counts, torch.stack(means), torch.stack(m2s))


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

    def statistics(self, local: Tensor | Recipe) -> tuple[Tensor, Tensor]:
        """Mean and ``sqrt(variance + eps)``, (B, groups) or (1, C), replicated, in fp64; with derivatives if needed."""
        layout, a_row = self.row_layout, self._a_row(local)
        if torch.compiler.is_compiling() or (isinstance(local, Tensor) and needs_grad(local)):
            _, mean, m2 = self._moments(local)
            count, mean, m2 = merge_ranks(layout, a_row, mean, m2, self.name, self.op)
            return mean, (m2 / max(count, 1) + self.eps).sqrt()
        counts, parts = self._parts(local)
        if layout.world_size > 1:
            own = parts[0] if len(counts) == 1 else torch.stack(merge_deviations(counts, parts, 0.0))
            counts = [a_row * height for height in layout.heights]
            if self.groups:
                counts, parts = gather_moments(counts, own, self.name, self.op)
            else:
                parts = stack_ranks(own, self.name, self.op)
        return merge_deviations(counts, parts, self.eps)

    def _moments(self, local: Tensor | Recipe) -> tuple[int, Tensor, Tensor]:
        exact, along = self._is_seen(local), max(self.row_layout.dim, 2)
        if not self.groups:
            count, mean, m2 = moments(local, (0, *range(2, local.ndim)), along, exact)
        elif sizes_of(local.device).reads_twice:  # a sum over channels too is slow there, above all of channels last
            count, *channels = moments(local, tuple(range(2, local.ndim)), along, exact)
            members = [t.flatten(1).unflatten(1, (self.groups, -1)).movedim(2, 0) for t in channels]
            count, mean, m2 = merge_moments([count] * len(members[0]), *members)
        else:
            count, mean, m2 = moments(local, tuple(range(2, local.ndim + 1)), along, exact, self.groups)
        return count, mean.flatten(1), m2.flatten(1)

    def _parts(self, local: Tensor | Recipe) -> tuple[Sequence[int], Tensor]:
        """How many samples, and mean and deviation, (K, 2, ...), parts of this rank's rows have."""
        if isinstance(local, Recipe) and local.value is not None:
            local = local.value
        if sizes_of(local.device).reads_twice or self._is_seen(local) or not local.shape.numel():
            count, mean, m2 = self._moments(local)
            return [count], torch.stack([mean, (m2 / max(count, 1)).clamp_(min=0).sqrt_()]).unsqueeze(0)
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
        parts = torch.empty((len(found), *mean.shape), dtype=_double(local), device=local.device)
        foreach_copy(parts.unbind(0), found)
        return counts, parts.view(-1, 2, *mean.shape)

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


@lru_cache(maxsize=4096)
def _samples_of_a_row(shape: torch.Size, dim: int, groups: int) -> int:
    others = [n for d, n in enumerate(shape) if d not in (1, dim) and (d or not groups)]
    return math.prod(others) * (shape[1] // groups if groups else 1)


def of_channels(t: Tensor, channels: int) -> Tensor:
    """(B, groups) at every channel: (B, C)."""
    return t if t.shape[1] == channels else t.repeat_interleave(channels // t.shape[1], 1)


def normalize(local: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """``(local - mean) / spread * weight + bias``; and the statistics, mean and spread, without gradients.

    ``local``: (B, C, ...), this rank's rows; ``weight`` and ``bias``: (C,), replicated.
    """
    if needs_grad(local, weight, bias):
        return _Normalize.apply(local, weight, bias, norm)
    mean, spread = norm.statistics(local)
    if sizes_of(local.device).reads_twice:
        local = local.contiguous(memory_format=memory_format(local))  # as torch's own group norm does
    if local.numel() == 0:
        return torch.empty_like(local), mean, spread
    step, along = scaling(local, mean, spread, weight, bias), max(norm.row_layout.dim, 2)
    out = rows_now(step, [local], along, shape=local.shape, chunk_rows=_chunk_rows(local, along))
    return out, mean, spread


def normalize_rows(
    x: PatchTensor, weight: Tensor | None, bias: Tensor | None, norm: Norm
) -> tuple[PatchTensor, Tensor, Tensor]:
    """The same of a sharded tensor: the statistics now; the rows may be deferred, and those of ``x`` may be, too."""
    if x.row_layout.dim < 2 or deferrable([x], x) is None:
        out, mean, spread = normalize(x.local, weight, bias, norm)
        return wrap(out, x), mean, spread
    rows = x.as_recipe
    mean, spread = norm.statistics(rows)
    weight, bias = (t if t is None else t.detach() for t in (weight, bias))
    return run_rows(norm.op, [x], scaling(rows, mean, spread, weight, bias), shape=rows.shape), mean, spread


def _chunk_rows(local: Tensor, along: int) -> int | None:
    """Rows of the dim ``along`` that a second reading finds in the cache; None on devices without a large one."""
    sizes = sizes_of(local.device)
    if not sizes.reads_twice or torch.compiler.is_compiling():
        return None
    return max(sizes.statistics_bytes * local.shape[along] // max(local.numel() * local.element_size(), 1), 1)


def scaling(like: Tensor | Recipe, mean: Tensor, spread: Tensor, weight: Tensor | None, bias: Tensor | None) -> Step:
    """``(rows - mean) / spread * weight + bias`` of any rows of a tensor like this one, in fp32 or better.

    As ``rows * scale + shift``, which is one kernel, as torch's own on a GPU. On a CPU the mean is taken away first:
    far from 0 that formula rounds twice what cancels.
    """
    precise = torch.promote_types(like.dtype, torch.float32)
    (samples, groups), channels = mean.shape, like.shape[1]
    shape = (samples, groups, channels // groups)
    mean, spread = mean.unsqueeze(-1), spread.unsqueeze(-1)
    scale = torch.empty(shape, dtype=precise, device=like.device)
    shift = torch.empty_like(scale)
    if weight is None:
        torch.reciprocal(spread.expand(shape), out=scale)
    else:
        torch.div(weight.view(shape[1:]), spread, out=scale)
    offset = scale.new_zeros(shape[1:]) if bias is None else bias.view(shape[1:])
    broad = [samples, channels, *[1] * (like.ndim - 2)]
    if not sizes_of(like.device).reads_twice:
        torch.addcmul(offset, mean, scale, value=-1, out=shift)
        by, to = scale.view(broad), shift.view(broad)

        def scaled(parts: Sequence[Tensor], spare: Sequence[Tensor], lo: int, hi: int) -> Tensor:
            rows = parts[0]
            out = spare[0] if spare else torch.empty_like(rows, memory_format=format_of_rows(rows))
            return torch.addcmul(to, rows, by, out=out)

        return scaled
    middle = mean.to(precise)
    torch.addcmul(offset, middle - mean, scale, out=shift)  # with what rounding took from the mean
    centre, by, to = middle.expand(shape).reshape(broad), scale.view(broad), shift.view(broad)

    def centred(parts: Sequence[Tensor], spare: Sequence[Tensor], lo: int, hi: int) -> Tensor:
        out = spare[0] if spare else torch.empty_like(parts[0])
        rest = torch.sub(parts[0], centre, out=out if out.dtype == precise else None)
        return torch.add(rest.mul_(by), to, out=out)  # addcmul takes three times as long where channels come first

    return centred


class _Normalize(torch.autograd.Function):
    """Keeps the input alone; its backward sums two numbers a channel over the ranks, in one collective."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, spread = normalize(local, weight, bias, norm)
        ctx.save_for_backward(local, weight, mean, spread)
        ctx.norm = norm
        ctx.mark_non_differentiable(mean, spread)
        return out, mean, spread

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        norm: Norm = ctx.norm
        local, weight, mean, spread = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative goes through the statistics too
            mean, spread = norm.statistics(local)
        precise, channels = torch.promote_types(local.dtype, torch.float32), local.shape[1]
        mean, spread = (of_channels(t.to(precise), channels) for t in (mean, spread))
        rstd, count = spread.reciprocal(), norm.count(local)
        dims, shape = tuple(range(2, local.ndim)), [*mean.shape] + [1] * (local.ndim - 2)
        centred = local - replicated_operand(mean, norm.name).view(shape)
        sums = torch.stack([(grad * centred).sum(dims), grad.sum(dims, dtype=mean.dtype)])
        if not norm.groups:
            sums = sums.sum(1, keepdim=True)
        of_products, of_grads = sum_partials(sums, norm.name, f"{norm.op} backward")
        of_products = of_products * rstd
        needed, d_local = ctx.needs_input_grad, None
        if needed[0]:
            scale: Any = 1.0 if weight is None else weight.to(mean.dtype)
            by_centred = norm.sums(scale * of_products) * rstd.square() / -count
            shift = norm.sums(scale * of_grads) * rstd / -count
            factors = replicated_operand(torch.stack([rstd * scale, by_centred, shift]), norm.name)
            by_grad, by_centred, shift = (t.view(shape) for t in factors)
            d_local = torch.addcmul(torch.addcmul(shift, centred, by_centred), grad, by_grad).to(local.dtype)
        return d_local, of_products.sum(0) if needed[1] else None, of_grads.sum(0) if needed[2] else None, None
