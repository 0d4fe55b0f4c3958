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
from torch._subclasses.fake_tensor import FakeTensor

from distpatch.collectives import merge_moments, spread, stack_ranks, sum_partials
from distpatch.formats import memory_format
from distpatch.group import communicator_of
from distpatch.layout import RowLayout
from distpatch.rules.registry import needs_grad

# Rows are read twice, for the mean and around it: on a CPU from a cache of this size.
CHUNK_BYTES = {"cpu": 512 << 10}
CHUNK_BYTES_ELSEWHERE = 64 << 20


def moments(local: Tensor, dims: tuple[int, ...], along: int, exact: bool = False) -> tuple[int, Tensor, Tensor]:
    """Count, mean and centred second moment over ``dims``, which stay as dims of size 1, in fp64.

    Taken around a rounded mean, in fp32 or better, and corrected: where the mean is a thousand deviations
    from 0, its rounding alone is as large as torch's whole error. ``exact``: squares are added in
    fp64, for a variance that somebody sees. Without gradients in chunks of rows of the dim ``along``, one of ``dims``.
    """
    precise = torch.promote_types(local.dtype, torch.float32)
    double = torch.float64 if local.device.type != "mps" else precise  # which has none
    rows_bytes = local.numel() // max(local.shape[along], 1) * local.element_size()
    chunk_bytes = CHUNK_BYTES.get(local.device.type, CHUNK_BYTES_ELSEWHERE)
    grads = needs_grad(local)
    whole = grads or torch.compiler.is_compiling()  # a compiler makes its own chunks
    chunks = _chunks(local, local.shape[along] if whole else chunk_bytes // max(rows_bytes, 1), along)
    counts, means, m2s = [], [], []
    for chunk in chunks[:1] if isinstance(local, FakeTensor) else chunks:  # of fake ones only the sizes are asked
        count = math.prod(chunk.shape[d] for d in dims)
        middle = chunk.detach().sum(dims, keepdim=True, dtype=precise) / max(count, 1)
        centred = chunk - middle
        rest = centred.sum(dims, keepdim=True) / max(count, 1)
        squared = centred.square() if grads else centred.square_()
        m2s.append(
            squared.sum(dims, keepdim=True, dtype=double if exact else None).to(double)
            - count * rest.to(double).square()
        )
        means.append(middle.to(double) + rest)
        counts.append(count)
    if len(counts) == 1:
        return counts[0], means[0], m2s[0]
    return merge_moments(counts, torch.stack(means), torch.stack(m2s))


def _chunks(local: Tensor, rows: int, along: int) -> Sequence[Tensor]:
    return (local,) if rows >= local.shape[along] else local.split(max(rows, 1), along)


def merge_ranks(
    layout: RowLayout, a_row: int, mean: Tensor, m2: Tensor, name: str, op: str
) -> tuple[int, Tensor, Tensor]:
    """The moments of all ranks' rows, in one collective; each row has ``a_row`` samples."""
    counts = [a_row * height for height in layout.heights]
    if len(counts) == 1:
        return counts[0], mean, m2
    ranks = stack_ranks(torch.stack([mean, m2]), name, op)
    return merge_moments(counts, ranks[:, 0], ranks[:, 1])


def merge_displaced(
    layout: RowLayout, a_row: int, mean: Tensor, m2: Tensor, name: str, op: str
) -> tuple[int, Tensor, Tensor]:
    """As ``merge_ranks``; in a displaced step by its policy, except where a compiler has to see the collective."""
    policy = None if torch.compiler.is_compiling() else communicator_of(name).policy
    if policy is None:
        return merge_ranks(layout, a_row, mean, m2, name, op)
    return policy.moments(op, [a_row * height for height in layout.heights], mean, m2)


@dataclass(frozen=True)
class Norm:
    """What a normalisation of (B, C, ..., rows, ...) takes its statistics over.

    ``groups``: of channels, each of each sample; 0: each channel over the whole batch, which alone may be
    sharded along dim 0. ``rows``: the tensor's layout; ``name``: the communicator's.
    """

    groups: int
    eps: float
    rows: RowLayout
    name: str
    op: str

    def __post_init__(self) -> None:
        if self.eps < 0:  # here, since idle ranks would not notice
            raise ValueError(f"{self.op}: eps must not be negative, but is {self.eps}")

    def statistics(self, local: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (biased) variance that a channel of a sample has, (B, C) or (1, C), replicated, in fp64."""
        channels, row = local.shape[1], self.rows.dim
        count, mean, m2 = moments(local, tuple(range(2, local.ndim)), max(row, 2), exact=self.groups in {0, channels})
        mean, m2 = self._members(mean), self._members(m2)
        count, mean, m2 = merge_moments([count] * len(mean), mean, m2)
        merge = merge_displaced if self.groups else merge_ranks
        count, mean, m2 = merge(self.rows, self._a_row(local), mean, m2, self.name, self.op)
        return self._everyone(mean, channels), self._everyone(m2 / max(count, 1), channels)

    def count(self, local: Tensor) -> int:
        """Samples of one statistic, on all ranks together."""
        return self._a_row(local) * self.rows.size

    def _a_row(self, local: Tensor) -> int:
        others = [n for d, n in enumerate(local.shape) if d not in (1, self.rows.dim) and (d or not self.groups)]
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
    return _scaled(local, mean, var, weight, bias, norm), mean, var


def _scaled(local: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
    local = local.contiguous(memory_format=memory_format(local))  # as torch's own group norm does
    if local.numel() == 0:
        return torch.empty_like(local)
    precise, eps = torch.promote_types(local.dtype, torch.float32), norm.eps
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    middle = mean.to(precise)
    shift = (middle - mean) * scale + (0 if bias is None else bias)  # with what rounding took from the mean
    if local.device.type == "cpu" and local.dtype == precise:
        return _centred(local, middle, scale.to(precise), shift.to(precise), max(norm.rows.dim, 2))
    mean, var, bias = middle, var.to(precise), shift.to(precise)
    weight = None if weight is None else weight.to(precise)
    # Batch norm in evaluation is this formula, in one pass, computed in fp32 for half precision.
    if len(mean) == 1:
        return F.batch_norm(local, mean[0], var[0], weight, bias[0], eps=eps)
    out = torch.empty_like(local)
    for sample, rows in enumerate(local.split(1)):
        out[sample] = F.batch_norm(rows, mean[sample], var[sample], weight, bias[sample], eps=eps)[0]
    return out


def _centred(local: Tensor, middle: Tensor, scale: Tensor, shift: Tensor, along: int) -> Tensor:
    """``(local - middle) * scale + shift``, where torch's kernel for CPUs has ``local * scale + shift``.

    Far from 0 that rounds twice what cancels. Each chunk is in the cache for all three steps.
    """
    middle, scale, shift = (t.view(*t.shape, *[1] * (local.ndim - 2)) for t in (middle, scale, shift))
    out = torch.empty_like(local)
    chunk_rows = CHUNK_BYTES["cpu"] * local.shape[along] // (local.numel() * local.element_size())
    for rows, result in zip(_chunks(local, chunk_rows, along), _chunks(out, chunk_rows, along)):
        torch.sub(rows, middle, out=result)
        result.mul_(scale).add_(shift)
    return out


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
        centred = local - spread(mean, norm.name).view(shape)
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
            factors = spread(torch.stack([rstd * scale, by_centred, shift]), norm.name)
            by_grad, by_centred, shift = (t.view(shape) for t in factors)
            d_local = torch.addcmul(torch.addcmul(shift, centred, by_centred), grad, by_grad).to(local.dtype)
        return d_local, of_products.sum(0) if needed[1] else None, of_grads.sum(0) if needed[2] else None, None
