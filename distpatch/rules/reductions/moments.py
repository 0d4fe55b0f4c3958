"""Means and variances of rows, merged over ranks; what norms take them over, and their gradient.

Never E[x²] - E[x]²: centred moments are merged by Chan's formula (``collectives.merge_moments``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.comm.collectives import gather_moments, merge_moments, replicated_operand, stack_ranks, sum_partials
from distpatch.layout.rows import RowLayout
from distpatch.layout.stencil import Interval
from distpatch.lazy.deferred_ops import Step
from distpatch.lazy.recipe import Recipe
from distpatch.lazy.row_patches import patches_to_run, rows_now
from distpatch.rules.core.executor import deferrable, run_rows
from distpatch.rules.core.operands import needs_grad, wrap
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.chunk_sizes import kind_of, sizes_of
from distpatch.torch_utils.memory_format import memory_format


def moments(
    local: Tensor | Recipe, dims: tuple[int, ...], along: int, exact: bool = False
) -> tuple[int, Tensor, Tensor]:
    """Count, mean and centred second moment over ``dims``, which stay as dims of size 1, in fp64.

    Taken around a rounded mean, in fp32 or better, and corrected: where the mean is a thousand deviations
    from 0, its rounding alone is as large as torch's whole error. On devices without a large cache in one reading
    by Welford's update, with torch's error. ``exact``: squares are added in fp64, for a variance that somebody sees,
    in either case around the mean. Without gradients in chunks of rows of the dim ``along``, one of ``dims``.
    """
    precise = torch.promote_types(local.dtype, torch.float32)
    double = torch.float64 if local.device.type != "mps" else precise  # which has none
    rows_bytes = local.shape.numel() // max(local.shape[along], 1) * local.dtype.itemsize
    sizes = sizes_of(local.device)
    if isinstance(local, Recipe) and local.value is not None:
        local = local.value
    grads = isinstance(local, Tensor) and needs_grad(local)
    whole = grads or torch.compiler.is_compiling()  # a compiler makes its own chunks
    rows = local.shape[along]
    intervals = _intervals(rows, rows if whole else sizes.statistics_bytes // max(rows_bytes, 1))
    counts, means, m2s = [], [], []
    for lo, hi in patches_to_run(intervals):
        chunk = local.evaluate(lo, hi) if isinstance(local, Recipe) else local.narrow(along, lo, hi - lo)
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


def _intervals(size: int, rows: int) -> list[Interval]:
    """All rows, so many at a time; one interval, where there are none."""
    return [(lo, min(lo + max(rows, 1), size)) for lo in range(0, size, max(rows, 1))] or [(0, 0)]


def merge_ranks(
    layout: RowLayout, a_row: int, mean: Tensor, m2: Tensor, name: str, op: str, *, normalises: bool = False
) -> tuple[int, Tensor, Tensor]:
    """The moments of all ranks' rows, in one collective; each row has ``a_row`` samples.

    ``normalises``: rows are normalised with them and they go nowhere else, so that the transport may know better.
    """
    counts: Sequence[int] = [a_row * height for height in layout.heights]
    if len(counts) == 1:
        return counts[0], mean, m2
    ranks = torch.stack([mean, m2])
    if normalises:
        counts, ranks = gather_moments(counts, ranks, name, op)
    else:
        ranks = stack_ranks(ranks, name, op)
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
        """Mean and (biased) variance that a channel of a sample has, (B, C) or (1, C), replicated, in fp64."""
        channels, row = local.shape[1], self.row_layout.dim
        count, mean, m2 = moments(local, tuple(range(2, local.ndim)), max(row, 2), exact=self.groups in {0, channels})
        mean, m2 = self._members(mean), self._members(m2)
        count, mean, m2 = merge_moments([count] * len(mean), mean, m2)
        a_row, whole = self._a_row(local), self.row_layout
        count, mean, m2 = merge_ranks(whole, a_row, mean, m2, self.name, self.op, normalises=self.groups > 0)
        return self._everyone(mean, channels), self._everyone(m2 / max(count, 1), channels)

    def count(self, local: Tensor | Recipe) -> int:
        """Samples of one statistic, on all ranks together."""
        return self._a_row(local) * self.row_layout.size

    def _a_row(self, local: Tensor | Recipe) -> int:
        others = [n for d, n in enumerate(local.shape) if d not in (1, self.row_layout.dim) and (d or not self.groups)]
        return math.prod(others) * (local.shape[1] // self.groups if self.groups else 1)

    def sums(self, per_channel: Tensor) -> Tensor:
        """(B or 1, C) summed over each group, at every channel."""
        if not self.groups:
            return per_channel
        return self._everyone(self._members(per_channel).sum(0), per_channel.shape[1])

    def _members(self, t: Tensor) -> Tensor:
        """(B, C, 1, ...) with those that share a statistic stacked along dim 0: (K, B, groups), or (B, C)."""
        return t.reshape(len(t), self.groups, -1).movedim(2, 0) if self.groups else t.flatten(1)

    def _everyone(self, t: Tensor, channels: int) -> Tensor:
        return t.repeat_interleave(channels // self.groups, 1) if self.groups else t.unsqueeze(0)


def normalize(local: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """``(local - mean) / sqrt(var + eps) * weight + bias``; and the mean and var, without gradients.

    ``local``: (B, C, ...), this rank's rows; ``weight`` and ``bias``: (C,), replicated.
    """
    if needs_grad(local, weight, bias):
        return _Normalize.apply(local, weight, bias, norm)
    mean, var = norm.statistics(local)
    local = local.contiguous(memory_format=memory_format(local))  # as torch's own group norm does
    if local.numel() == 0:
        return torch.empty_like(local), mean, var
    step, along = scaling(local, mean, var, weight, bias, norm.eps), max(norm.row_layout.dim, 2)
    out = rows_now(step, [local], along, shape=local.shape, chunk_rows=_chunk_rows(local, along))
    return out, mean, var


def normalize_rows(
    x: PatchTensor, weight: Tensor | None, bias: Tensor | None, norm: Norm
) -> tuple[PatchTensor, Tensor, Tensor]:
    """The same of a sharded tensor: the statistics now; the rows may be deferred, and those of ``x`` may be, too."""
    if x.row_layout.dim < 2 or deferrable([x], x) is None:
        out, mean, var = normalize(x.local, weight, bias, norm)
        return wrap(out, x), mean, var
    rows = x.as_recipe
    mean, var = norm.statistics(rows)
    weight, bias = (t if t is None else t.detach() for t in (weight, bias))
    return run_rows(norm.op, [x], scaling(rows, mean, var, weight, bias, norm.eps), shape=rows.shape), mean, var


def _chunk_rows(local: Tensor, along: int) -> int | None:
    """Rows of the dim ``along`` that a second reading finds in the cache; None on devices without a large one."""
    sizes = sizes_of(local.device)
    if not sizes.reads_twice or torch.compiler.is_compiling():
        return None
    return max(sizes.statistics_bytes * local.shape[along] // max(local.numel() * local.element_size(), 1), 1)


def scaling(
    like: Tensor | Recipe, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Step:
    """``(rows - mean) / sqrt(var + eps) * weight + bias`` of any rows of a tensor like this one.

    On a CPU in this order: torch's kernel has ``rows * scale + shift``, which far from 0 rounds twice what cancels.
    """
    precise = torch.promote_types(like.dtype, torch.float32)
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    middle = mean.to(precise)
    shift = (middle - mean) * scale + (0 if bias is None else bias)  # with what rounding took from the mean
    if kind_of(like.device) == "cpu" and like.dtype == precise:
        shape = [*middle.shape, *[1] * (like.ndim - 2)]
        centre, by, to = (t.to(precise).view(shape) for t in (middle, scale, shift))

        def centred(parts: Sequence[Tensor], spare: Sequence[Tensor], lo: int, hi: int) -> Tensor:
            result = torch.sub(parts[0], centre, out=spare[0] if spare else None)
            return result.mul_(by).add_(to)

        return centred
    mean, var, bias = middle, var.to(precise), shift.to(precise)
    weight = None if weight is None else weight.to(precise)

    def normalized(parts: Sequence[Tensor], spare: Sequence[Tensor], lo: int, hi: int) -> Tensor:
        """Batch norm in evaluation is this formula, in one pass, computed in fp32 for half precision."""
        rows = parts[0]
        if len(mean) == 1:
            result = F.batch_norm(rows, mean[0], var[0], weight, bias[0], eps=eps)
            return spare[0].copy_(result) if spare else result
        result = spare[0] if spare else torch.empty_like(rows)
        for sample, part in enumerate(rows.split(1)):
            result[sample] = F.batch_norm(part, mean[sample], var[sample], weight, bias[sample], eps=eps)[0]
        return result

    return normalized


class _Normalize(torch.autograd.Function):
    """Keeps the input alone; its backward sums two numbers a channel over the ranks, in one collective."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, var = normalize(local, weight, bias, norm)
        ctx.save_for_backward(local, weight, mean, var)
        ctx.norm = norm
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        norm: Norm = ctx.norm
        local, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative goes through the statistics too
            mean, var = norm.statistics(local)
        mean, var = (t.to(torch.promote_types(local.dtype, torch.float32)) for t in (mean, var))
        rstd, count = (var + norm.eps).rsqrt(), norm.count(local)
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
