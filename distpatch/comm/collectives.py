"""Differentiable movements between replicated and sharded values.

A plain tensor is replicated: every rank holds the same value and, in the backward pass, the same
cotangent. Rows of a shard are one rank's own. So, forward and backward:

    shard_rows      slice                       gather of the slices
    gather_rows     gather                      slice
    spread, spread_all   identity (before a replicated tensor meets rows)    sum over ranks
    sum_partials    sum over ranks              identity
    stack_ranks     one row a rank              own row
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.communicator import communicator_of
from distpatch.comm.row_exchange import alias, fetch_rows, is_plain
from distpatch.comm.watched import ring_traffic
from distpatch.layout.blocks import BlockLayout, InnerCut
from distpatch.layout.rows import RowLayout
from distpatch.layout.stencil import ceil_div
from distpatch.torch_utils.chunk_sizes import sizes_of
from distpatch.torch_utils.memory_format import format_of, in_memory_order, memory_format, order_in
from distpatch.torch_utils.operators import collective
from distpatch.torch_utils.overridable import has_rules, overridable


def in_one_thread(device: torch.device) -> None:
    """Backward passes that this thread starts run in it, as they do on a CPU.

    Autograd runs what is ready in the order of its numbers, which each thread counts by itself: in one thread every
    rank has the same order, also of a derivative's derivative, whose nodes are made in a backward pass.
    """
    if device.type != "cpu":
        torch.autograd.set_multithreading_enabled(False)


def gather_rows(
    local: Tensor, layout: RowLayout, name: str, op: str = "gather", order: Sequence[int] | None = None
) -> Tensor:
    """All rows of a sharded tensor, on every rank; the backward keeps the rank's own rows.

    ``order``: how dims stand in memory, innermost first, where that is known.
    """
    if not isinstance(layout, BlockLayout):
        return gather_in_order(local, layout, name, op, order)
    if not layout.size:
        return local
    rank = communicator_of(name).rank if name else 0
    if layout.is_joined:
        parts = [gather_rows(rows, piece, name, op) for rows, piece in cut_rows(local, layout, rank)]
        return join_rows(parts, layout.dim)
    rows = layout.opened
    blocks = local.unflatten(layout.dim, (layout.blocks, rows.height(rank)))
    return gather_rows(blocks, rows, name, op).flatten(layout.dim, rows.dim)


@overridable
def gather_in_order(local: Tensor, layout: RowLayout, name: str, op: str, order: Sequence[int] | None = None) -> Tensor:
    """``gather_rows`` of a layout without blocks."""
    return _Gather.apply(local, layout, name, op, order)


@overridable
def shard_rows(full: Tensor, layout: RowLayout, rank: int, name: str) -> Tensor:
    """This rank's rows of a replicated tensor, a view; the backward gathers the gradient."""
    if torch.is_grad_enabled() and full.requires_grad:
        in_one_thread(full.device)
        return _Shard.apply(full, layout, rank, name)
    return narrow_rows(full, layout, rank)


def narrow_rows(full: Tensor, layout: RowLayout, rank: int) -> Tensor:
    """This rank's rows of a whole tensor, a view; of a ``BlockLayout`` a copy."""
    if isinstance(layout, BlockLayout):
        if layout.is_joined:
            wholes = zip(full.split([piece.size for piece in layout.pieces], layout.dim), layout.pieces)
            return join_rows([narrow_rows(whole, piece, rank) for whole, piece in wholes], layout.dim)
        if not layout.size:
            return full
        blocks = full.unflatten(layout.dim, (layout.blocks, -1))
        return narrow_rows(blocks, layout.opened, rank).flatten(layout.dim, layout.dim + 1)
    lo, hi = layout.interval(rank)
    return full.narrow(layout.dim, lo, hi - lo)


def cut_rows(local: Tensor, layout: BlockLayout, rank: int) -> Iterator[tuple[Tensor, RowLayout]]:
    """A rank's rows of each part of a layout, views, and these parts' layouts."""
    start = 0
    for at, piece in enumerate(layout.pieces):
        height = piece.height(rank)
        yield narrow_inside(local, layout.dim, start, [InnerCut(at, (0, 1, 1), height)]), piece
        start += height


@overridable
def narrow_inside(local: Tensor, dim: int, start: int, cuts: Sequence[InnerCut]) -> Tensor:
    """A view of a rank's rows from ``start``, all that the cuts take of its layout's parts."""
    return local.narrow(dim, start, sum(cut.height for cut in cuts))


def join_rows(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat`` of a rank's rows: where these are sharded themselves they stay where they are."""
    return join_parts(next(filter(has_rules, tensors), tensors[0]), tensors, dim)


@overridable
def join_parts(lead: Tensor, tensors: Sequence[Tensor], dim: int) -> Tensor:
    """``join_rows``, of which ``lead`` is the first that is sharded itself, if any is."""
    return torch.cat(list(tensors), dim)


@overridable
def replicated_operand(tensor: Tensor, name: str) -> Tensor:
    """The same tensor, about to meet this rank's rows; the backward sums over ranks."""
    if name and torch.is_grad_enabled() and tensor.requires_grad:
        return _Spread.apply(tensor, name)
    return tensor


def replicated_operands(tensors: Sequence[Tensor], name: str) -> list[Tensor]:
    """``replicated_operand`` for many tensors at once: their gradients are summed together when all have come."""
    return list(_SpreadAll.apply(name, *tensors))


def join_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, whose gradients go on together, and in one order, when all have come.

    For what was spread or fetched and meets in one operation. Which kernels torch chooses may depend on how
    many rows a rank has; the order in which gradients come out of them must not, as each is collective.
    """
    tensors = list(tensors)
    which = [i for i, t in enumerate(tensors) if t.requires_grad] if torch.is_grad_enabled() else []
    if len(which) > 1:
        for i, t in zip(which, _Together.apply(*(tensors[i] for i in which)), strict=True):
            tensors[i] = t
    return tensors


@overridable
def sum_partials(tensor: Tensor, name: str, op: str) -> Tensor:
    """The sum of every rank's partial result, on every rank; bit-identical on all."""
    if not name:
        return tensor
    return _summed(tensor, name, op) if is_plain(tensor) else _Sum.apply(tensor, name, op)


def share_out(local: Tensor, shares: Tensor, value: Tensor, name: str) -> Tensor:
    """``value``, replicated, which is ``sum(shares * local)`` over all ranks: the gradient is that of the sum.

    For what was found another way, such as a maximum.
    """
    if torch.is_grad_enabled() and local.requires_grad:
        return _ShareOut.apply(local, shares, value, name)
    return value


@overridable
def stack_ranks(tensor: Tensor, name: str, op: str) -> Tensor:
    """Every rank's (small) tensor, stacked along a new first dim in rank order."""
    if not name:
        return tensor.unsqueeze(0)
    return _gathered(tensor, name, op) if is_plain(tensor) else _Stack.apply(tensor, name, op)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, layout: RowLayout, name: str, op: str, order: Sequence[int] | None) -> Tensor:
        ctx.layout, ctx.name = layout, name
        all_rows = (((0, layout.size),),) * layout.world_size
        shape = [layout.size if d == layout.dim else n for d, n in enumerate(local.shape)]
        # The kernels that will read it must be the same on all ranks: not by what few rows look like.
        format = torch.contiguous_format if layout.is_tiny else memory_format(local)
        if order is not None:
            format = format_of(tuple(order))
            if tuple(order) == order_in(format, local.ndim):
                order = None
        across, parts = _parts(shape, layout.dim, local.element_size(), sizes_of(local.device).bucket_bytes)

        def fetch(rows: Tensor) -> Tensor:
            return fetch_rows(rows, layout.dim, layout.bounds, all_rows, name, op, False)[0]

        if parts == 1:
            rows = fetch(local)
            return rows.contiguous(memory_format=format) if order is None else in_memory_order(rows, order)
        if order is None:
            result = torch.empty(shape, memory_format=format, dtype=local.dtype, device=local.device)
        else:
            result = torch.empty_permuted(shape, tuple(order)[::-1], dtype=local.dtype, device=local.device)
        for rows, place in zip(local.chunk(parts, across), result.chunk(parts, across)):
            place.copy_(fetch(rows))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rank = communicator_of(ctx.name).rank
        return shard_rows(grad, ctx.layout, rank, ctx.name), None, None, None, None


def _parts(shape: Sequence[int], dim: int, itemsize: int, bucket_bytes: int) -> tuple[int, int]:
    """A dim, and in how many parts of it to gather: rows come one after the other, and are copied to where they belong.

    One where they belong one after the other, or are few.
    """
    across = max((d for d in range(len(shape)) if d != dim), key=lambda d: shape[d], default=dim)
    if across == dim or math.prod(shape[:dim]) == 1:
        return across, 1
    return across, max(min(ceil_div(math.prod(shape) * itemsize, bucket_bytes), shape[across]), 1)


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, layout: RowLayout, rank: int, name: str) -> Tensor:
        ctx.layout, ctx.name = layout, name
        return narrow_rows(full, layout, rank)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather_rows(grad, ctx.layout, ctx.name, "shard backward"), None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, name: str) -> Tensor:
        ctx.name = name
        return alias(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return sum_partials(grad, ctx.name, "replicated gradient"), None


class _SpreadAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        ctx.set_materialize_grads(False)
        return tuple(alias(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        summed: dict[int, Tensor] = {}
        for bucket in _buckets([(i, grad) for i, grad in enumerate(grads) if grad is not None]):
            flat = torch.cat([grad.reshape(-1) for _, grad in bucket])
            parts = sum_partials(flat, ctx.name, "replicated gradients")
            sizes = [grad.numel() for _, grad in bucket]
            for (index, grad), part in zip(bucket, parts.split(sizes), strict=True):
                summed[index] = part.view(grad.shape)
        return None, *(summed.get(i) for i in range(len(grads)))


def _buckets(grads: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Gradients of one dtype and device, up to ``bucket_bytes`` together: one message each."""
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    for item in grads:
        kinds.setdefault((item[1].dtype, item[1].device), []).append(item)
    for (_, device), kind in kinds.items():
        bucket_bytes = sizes_of(device).bucket_bytes
        bucket: list[tuple[int, Tensor]] = []
        size_bytes = 0
        for index, grad in kind:
            bucket.append((index, grad))
            size_bytes += grad.numel() * grad.element_size()
            if size_bytes >= bucket_bytes:
                yield bucket
                bucket, size_bytes = [], 0
        if bucket:
            yield bucket


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(alias(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, name: str, op: str) -> Tensor:
        ctx.name = name
        return _all_reduce(tensor, name, op)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return replicated_operand(grad, ctx.name), None, None


class _ShareOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, shares: Tensor, value: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(shares)
        ctx.name = name
        return alias(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * replicated_operand(grad, ctx.name), None, None, None


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, name: str, op: str) -> Tensor:
        ctx.name = name
        return _all_gather(tensor, name, op)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return replicated_operand(grad, ctx.name)[communicator_of(ctx.name).rank], None, None


def _summed(tensor: Tensor, name: str, op: str) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    communicator_of(name).transport(total.device).all_reduce(total, op)
    return total


def _gathered(tensor: Tensor, name: str, op: str) -> Tensor:
    return communicator_of(name).transport(tensor.device).all_gather(tensor.contiguous(), op)


_all_reduce, _all_gather = collective("all_reduce")(_summed), collective("all_gather")(_gathered)


@torch.library.register_fake(_all_reduce)
def _(tensor: Tensor, name: str, op: str) -> Tensor:
    _simulate("all_reduce", tensor, name, op)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@torch.library.register_fake(_all_gather)
def _(tensor: Tensor, name: str, op: str) -> Tensor:
    _simulate("all_gather", tensor, name, op)
    return tensor.new_empty((communicator_of(name).size, *tensor.shape))


def _simulate(kind: str, tensor: Tensor, name: str, op: str) -> None:
    """Record what a rank of a simulated group would send."""
    comm = communicator_of(name)
    comm.planned(kind, op, *ring_traffic(kind, tensor.numel() * tensor.element_size(), comm.size))
