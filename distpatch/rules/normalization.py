"""Normalisation over the sharded dim: moments of the local rows, merged in one small collective."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.collectives import memory_format, merge_moments, stack_ranks
from distpatch.rules.fallback import fallback
from distpatch.rules.registry import named, needs_grad, op_name, rule, spread, wrap
from distpatch.tensor import PatchTensor

# Rows are read twice, for the mean and around it: on a CPU from a cache of this size.
CHUNK_BYTES = {"cpu": 512 << 10}
CHUNK_BYTES_ELSEWHERE = 64 << 20


@rule(*named("group_norm"))
def group_norm(
    func: Any,
    input: PatchTensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *cudnn: Any,
) -> Any:
    if input.rows.dim == 0:
        weight, bias = (None if t is None else spread(t, input) for t in (weight, bias))
        return wrap(func(input.local, num_groups, weight, bias, eps, *cudnn), input)
    channels = input.shape[1]
    if input.rows.dim == 1 or channels % num_groups:
        return fallback(func, input, num_groups, weight, bias, eps, *cudnn)
    counts, mean, m2 = channel_moments(input)
    grouped = [t.unflatten(1, (num_groups, -1)).movedim(2, 0) for t in (mean, m2)]
    count, mean, m2 = merge_moments([counts] * (channels // num_groups), *grouped)
    if input.region.comm.size > 1:
        a_row = math.prod(input.shape[2:]) // input.rows.size * (channels // num_groups)
        count, mean, m2 = merge_ranks(input, a_row, mean, m2, func)
    mean, var = (t.repeat_interleave(channels // num_groups, 1) for t in (mean, m2 / count))
    return wrap(normalize(input, mean, var, weight, bias, eps), input)


def channel_moments(x: PatchTensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean and centred second moment of each channel of the local rows, (B, C), in fp32 or better."""
    local, row = x.local, x.rows.dim
    precise = torch.promote_types(local.dtype, torch.float32)
    dims = tuple(range(2, local.ndim))
    rows_bytes = local.numel() // max(local.shape[row], 1) * local.element_size()
    chunk_bytes = CHUNK_BYTES.get(local.device.type, CHUNK_BYTES_ELSEWHERE)
    grads = needs_grad(local)
    chunk_rows = local.shape[row] if grads else chunk_bytes // max(rows_bytes, 1)
    counts, means, m2s = [], [], []
    for chunk in local.split(max(chunk_rows, 1), row):
        counts.append(chunk[0, 0].numel())
        mean = chunk.sum(dims, keepdim=True, dtype=precise) / max(counts[-1], 1)
        centred = chunk - mean
        if grads:
            m2s.append(centred.square().sum(dims))
        else:
            m2s.append(torch.linalg.vector_norm(centred, dim=dims).square())
        means.append(mean.flatten(1))
    return merge_moments(counts, torch.stack(means), torch.stack(m2s))


def merge_ranks(x: PatchTensor, a_row: int, mean: Tensor, m2: Tensor, func: Any) -> tuple[int, Tensor, Tensor]:
    """The moments of all ranks' rows, in one collective; each row has ``a_row`` samples."""
    counts = [a_row * (hi - lo) for lo, hi in pairwise(x.rows.bounds)]
    ranks = stack_ranks(torch.stack([mean, m2]), x.region.comm.name, op_name(func))
    return merge_moments(counts, ranks[:, 0], ranks[:, 1])


def normalize(
    x: PatchTensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` on the local rows.

    ``mean`` and ``var``: (B, C), replicated, in fp32 or better; ``weight`` and ``bias``: (C,).
    """
    local, (batch, channels) = x.local, mean.shape
    weight, bias = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
    if needs_grad(local, weight, bias):
        stats = spread(torch.stack([mean, (var + eps).rsqrt()]), x)
        shape = [batch, channels] + [1] * (local.ndim - 2)
        per_channel = [1, channels] + [1] * (local.ndim - 2)
        out = (local - stats[0].view(shape)) * stats[1].view(shape)
        if weight is not None:
            out = out * spread(weight, x).view(per_channel)
        if bias is not None:
            out = out + spread(bias, x).view(per_channel)
        return out.to(local.dtype)
    local = local.contiguous(memory_format=memory_format(local))  # as torch's own group norm does
    out = torch.empty_like(local)
    for sample in range(batch) if local.numel() else ():
        # Batch norm in evaluation is this formula, in one pass, computed in fp32 for half precision.
        one = F.batch_norm(local[sample : sample + 1], mean[sample], var[sample], weight, bias, eps=eps)
        if batch == 1:
            return one
        out[sample] = one[0]
    return out
