"""``(rows - mean) / spread * weight + bias``: of a rank's rows, and of its neighbours' that come with statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.collectives import replicated_operand, sum_partials
from distpatch.comm.moments_exchange import may_bring_rows
from distpatch.layout.blocks import BlockLayout
from distpatch.layout.rows import Needs
from distpatch.layout.stencil import WindowStencil
from distpatch.layout.transfers import plan_stencil
from distpatch.lazy.deferred_ops import Step
from distpatch.lazy.recipe import Recipe
from distpatch.lazy.row_patches import format_of_rows, rows_now
from distpatch.rules.core.executor import deferrable, run_rows
from distpatch.rules.core.halo import strips_of
from distpatch.rules.core.operands import needs_grad
from distpatch.rules.core.wrapping import wrap
from distpatch.rules.reductions.moments import Norm, of_channels
from distpatch.tensor.halo_rows import bring
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.chunk_sizes import sizes_of
from distpatch.torch_utils.memory_format import memory_format

_NEXT = WindowStencil(3, 1, 1, 1)  # the convolution that most norms of images stand before


def normalize(local: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """``(local - mean) / spread * weight + bias``; and the statistics, mean and spread, without gradients.

    ``local``: (B, C, ...), this rank's rows; ``weight`` and ``bias``: (C,), replicated.
    """
    if needs_grad(local, weight, bias):
        return _Normalize.apply(local, weight, bias, norm)
    mean, spread, _ = norm.statistics(local)
    return apply_scaling(local, scaling(local, mean, spread, weight, bias), norm), mean, spread


def apply_scaling(local: Tensor, step: Step, norm: Norm) -> Tensor:
    if sizes_of(local.device).reads_twice:
        local = local.contiguous(memory_format=memory_format(local))  # as torch's own group norm does
    along = max(norm.row_layout.dim, 2)
    return rows_now(step, [local], along, shape=local.shape, chunk_rows=_chunk_rows(local, along))


def normalize_rows(
    x: PatchTensor, weight: Tensor | None, bias: Tensor | None, norm: Norm
) -> tuple[PatchTensor, Tensor, Tensor]:
    """The same of a sharded tensor: the statistics now; the rows may be deferred, and those of ``x`` may be, too.

    Without gradients the result brings its neighbours' rows along (``halo_rows.py``), which a convolution may need.
    """
    if torch.is_grad_enabled() or x.row_layout.dim < 2:
        out, mean, spread = normalize(x.local, weight, bias, norm)
        return wrap(out, x), mean, spread
    deferred = deferrable([x], x) is not None
    rows = x.as_recipe if deferred else x.local
    needs = _halo_of(x)  # which waits for what is under way: not before the rows that need none of it are computed
    mean, spread, halo = norm.statistics(rows, strips_of(x, needs) if needs else None)
    step = scaling(rows, mean, spread, weight, bias)
    result = run_rows(norm.op, [x], step, shape=rows.shape) if deferred else wrap(apply_scaling(x.local, step, norm), x)
    if needs and halo is not None:
        bring(result, needs, step([halo], [], 0, halo.shape[x.row_layout.dim]))
    return result, mean, spread


def _halo_of(x: PatchTensor) -> Needs | None:
    """One row above and one below, of images, which a kernel of three rows reads; None where none can come.

    Without gradients alone.
    """
    layout = x.row_layout
    if x.ndim < 4 or layout.dim < 2 or layout.is_tiny or layout.world_size == 1 or x.row_stride:
        return None
    if isinstance(layout, BlockLayout) or x.region.inner is not None:
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    return plan_stencil(layout.bounds, _NEXT).needs if may_bring_rows(x.region.comm.name, x.device) else None


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
            mean, spread = norm.statistics(local)[:2]
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
