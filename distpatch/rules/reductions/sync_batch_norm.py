"""``nn.SyncBatchNorm``: statistics over its process group, of which ranks may share the rows of one batch.

They are merged over the rows first, as those of any norm, so that a rank that fails is named; then over the group,
where each rank of a batch counts as its share of it: a group of all ranks and one of data parallelism alone give the
same.
"""

from __future__ import annotations

from threading import get_ident
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distpatch.comm.collectives import sum_partials
from distpatch.comm.communicator import Communicator, connected
from distpatch.errors import UnsupportedOpError
from distpatch.layout.rows import RowLayout
from distpatch.rules.core.redistribution import along_rows
from distpatch.rules.core.registry import rule
from distpatch.rules.core.wrapping import wrap
from distpatch.rules.reductions.moments import Norm
from distpatch.rules.reductions.normalization import keep_running, refuse_sharded
from distpatch.rules.reductions.normalize import apply_scaling, scaling
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils import private

OP = "SyncBatchNorm"


class _Everyone(NamedTuple):
    """``group``: over which statistics are merged; ``alike``: of its ranks, those that share this rank's batch."""

    group: dist.ProcessGroup
    alike: int

    def statistics(self, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance (1, C) and the count of all samples, of those of each rank's batch; the same on all."""
        share = mean.new_full((1, 1), count / self.alike)
        own = torch.cat([mean, variance, share], 1)
        everyone = own.new_empty((self.group.size(), own.shape[1]))
        private.all_gather(everyone.view(-1), own.view(-1), self.group)
        means, variances, shares = everyone.split([mean.shape[1], mean.shape[1], 1], 1)
        total = shares.sum()
        weights = shares / total
        union = means[:1] + ((means - means[:1]) * weights).sum(0, keepdim=True)
        spread = ((variances + (means - union).square()) * weights).sum(0, keepdim=True)
        return union, spread, total

    def total(self, sums: Tensor) -> Tensor:
        """The sum over all batches of what every rank of a batch holds."""
        total = sums / self.alike
        dist.all_reduce(total, group=self.group)
        return total


@rule(private.SyncBatchNorm, any_order=True, keeps_format=True, asks_when_plain=True)
def sync_batch_norm(
    func: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    momentum: float,
    process_group: dist.ProcessGroup,
    *world_size: int,
) -> Any:
    refuse_sharded(func, (running_mean, running_var))
    weight, bias = (t if t is None else gather_replicated(t) for t in (weight, bias))
    x = along_rows(input, func) if isinstance(input, PatchTensor) else None
    if x is None and not _in_a_call(process_group):
        return NotImplemented
    alike = 1 if x is None else _ranks_of_a_batch(x.comm, process_group)
    if x is not None and x.row_layout.dim != 1:
        layout, local = x.row_layout, x.local
    else:  # every rank of the rows holds all of it
        x, local = None, gather_replicated(input)
        layout = RowLayout(2, (0, local.shape[2] if local.ndim > 2 else 1))
    rows = local.unsqueeze(-1) if local.ndim == 2 else local
    norm = Norm(0, eps, layout, "" if x is None else x.comm.name, OP)
    everyone = _Everyone(process_group, alike)
    out, mean, variance, total = _SyncNormalize.apply(rows, weight, bias, norm, everyone)
    keep_running(running_mean, running_var, mean, variance, total, momentum)
    out = out.squeeze(-1) if local.ndim == 2 else out
    return out if x is None else wrap(out, x)


def _in_a_call(group: dist.ProcessGroup) -> bool:
    """Whether this thread is in a converted model's call, with a tensor of which each rank of the rows has all.

    Raises ``UnsupportedOpError`` where several of these are in the group. In a backward pass, which may run again
    what a call has run, that was seen before.
    """
    here = get_ident()
    comms = [comm for comm in connected() if comm.in_call and comm.thread == here]
    if not private.in_backward() and any(_ranks_of_a_batch(comm, group) > 1 for comm in comms):
        raise UnsupportedOpError(
            "SyncBatchNorm of a tensor without rows (a picture's mean, say), of which several ranks of its process "
            "group hold the same: give it the group of data parallelism alone, "
            'SyncBatchNorm.convert_sync_batchnorm(model, mesh["data"].get_group())'
        )
    return bool(comms)


def _ranks_of_a_batch(comm: Communicator, group: dist.ProcessGroup) -> int:
    if comm.group is None:
        return 1
    ranks = dist.get_process_group_ranks
    return len(set(ranks(comm.group)) & set(ranks(group)))


class _SyncNormalize(torch.autograd.Function):
    """Keeps the input alone, as any norm; its backward sums two numbers a channel over rows, then over the group."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm, everyone: _Everyone
    ) -> tuple[Tensor, ...]:
        mean, spread, _ = norm.statistics(local)
        mean, variance, total = everyone.statistics(mean, norm.variance(spread), norm.count(local))
        spread = (variance + norm.eps).sqrt()
        out = apply_scaling(local, scaling(local, mean, spread, weight, bias), norm)
        ctx.save_for_backward(local, weight, mean, spread, total)
        ctx.norm, ctx.everyone = norm, everyone
        ctx.mark_non_differentiable(mean, variance, total)
        return out, mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        norm: Norm = ctx.norm
        local, weight, *statistics = ctx.saved_tensors
        precise = torch.promote_types(local.dtype, torch.float32)
        mean, spread, total = (t.to(precise) for t in statistics)
        shape, dims = [1, -1] + [1] * (local.ndim - 2), (0, *range(2, local.ndim))
        centred = local - mean.view(shape)
        sums = torch.stack([(grad * centred).sum(dims), grad.sum(dims, dtype=precise)])
        of_products, of_grads = sums = sum_partials(sums, norm.name, f"{OP} backward")
        d_local, rstd = None, spread[0].reciprocal()
        if ctx.needs_input_grad[0]:
            scale = rstd if weight is None else rstd * weight
            all_products, all_grads = ctx.everyone.total(sums) / total
            d_local = (
                grad - all_grads.view(shape) - centred * (all_products * rstd.square()).view(shape)
            ) * scale.view(shape)
            d_local = d_local.to(local.dtype)
        needed = ctx.needs_input_grad
        d_weight = (of_products * rstd).to(weight.dtype) if needed[1] else None
        return d_local, d_weight, of_grads.to(grad.dtype) if needed[2] else None, None, None
