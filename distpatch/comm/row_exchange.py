"""Rows that move between ranks: the only place that makes messages of them.

``fetch_rows`` gives each rank the intervals of global rows that it asks for, ``return_rows`` is its
transpose (rows of gradient go back to their owners and are added); each is the other's backward.
All ranks know everyone's needs, so nothing but the rows themselves is sent.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.overrides import handle_torch_function

from distpatch.comm.communicator import Communicator, communicator_of
from distpatch.comm.transport import Batch, Finish
from distpatch.comm.watched import UnderWay
from distpatch.layout.rows import Bounds, Needs
from distpatch.layout.transfers import TransferPlan, flat_needs, grouped_needs, plan_fetch, plan_transfer, wire_order
from distpatch.torch_utils.operators import collective
from distpatch.torch_utils.overridable import has_rules
from distpatch.torch_utils.private import count_dispatch_modes, in_functorch

# Rows of these are never those of an earlier step: what leaves the sharded computation, or is gathered for an
# operation without a rule.
AT_ONCE = frozenset({"gather", "output"})
NAME = 3  # place of the communicator's name among the arguments behind the rows


def fetch_rows(
    local: Tensor, dim: int, bounds: Bounds, needs: Needs, name: str, op: str, channels_last: bool
) -> list[Tensor]:
    """Fetch the intervals of global rows ``needs[rank]``, from whoever owns them.

    ``local``: this rank's rows, ``bounds[rank]:bounds[rank + 1]`` of dimension ``dim``; ``name``: the
    communicator's. Returns one tensor an interval. All ranks call it; it is one batch of at most one
    message to and one from each other rank. Every piece must stay connected to the result, even where
    it is empty: the backward is collective too.
    """
    if is_plain(local):
        return _fetched(local, dim, bounds, needs, name, op, channels_last)
    if has_rules(local):  # sharded over an inner axis: rules/core/inner_axes.py
        given = local, dim, bounds, needs, name, op, channels_last
        parts: list[Tensor] = handle_torch_function(fetch_rows, (local,), *given)
        return parts
    flat = flat_needs(needs)
    if not any(flat):  # nobody needs anything, as all ranks know
        return [local.narrow(dim, 0, 0) for _ in needs[0]]
    pieces: list[Tensor] = _fetch(local, dim, list(bounds), flat, name, op, channels_last)
    return pieces


def alias(tensor: Tensor) -> Tensor:
    """The same tensor for autograd to give another node, with its strides.

    ``view_as`` gives dims of size 1 others, with which torch's gradient of a grouped convolution's weight is wrong
    (channels_last, a batch of one; seen in 2.13 on a CPU).
    """
    return tensor.expand_as(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether nobody but this rank's rows has to know of a transfer: it is called as it is, and not as an operator.

    An operator is what autograd, compilers, fake tensors, modes and profilers see, and what is lazy (``conj``) is
    computed for one; to call it takes longer than most of what it does.
    """
    return (
        type(tensor) is Tensor
        and not (tensor.is_conj() or tensor.is_neg())
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and not (count_dispatch_modes() or in_functorch() or profiler._is_profiler_enabled)
    )


def begin_rows(
    local: Tensor, dim: int, bounds: Bounds, needs: Needs, name: str, op: str, channels_last: bool
) -> tuple[list[Tensor], Finish]:
    """The same behind what is computed next: the rows are there when the function that is returned was called.

    Without gradients, and not in a compiled graph. Until then ``local`` may not be written to.
    """
    begun: list[UnderWay] = []
    _thread.begun = begun
    try:
        pieces = fetch_rows(local, dim, bounds, needs, name, op, channels_last)
    finally:
        _thread.begun = None
    return pieces, begun[0].finish if begun else _nothing


def _nothing() -> None:
    """Of fake rows, or where there are no other ranks, nothing is under way."""


class _Thread(threading.local):
    begun: list[UnderWay] | None = None  # where an exchange is to be begun only


_thread = _Thread()


@collective("fetch_rows")
def _fetch(
    local: Tensor,
    dim: int,
    bounds: Sequence[int],
    needs: Sequence[int],
    name: str,
    op: str,
    channels_last: bool,
) -> list[Tensor]:
    size = communicator_of(name).size
    return _fetched(local, dim, tuple(bounds), grouped_needs(tuple(needs), size), name, op, channels_last)


def _fetched(
    local: Tensor, dim: int, bounds: Bounds, needs: Needs, name: str, op: str, channels_last: bool
) -> list[Tensor]:
    comm = communicator_of(name)
    plan = plan_fetch(local.shape, dim, bounds, needs, comm.rank, channels_last)
    if not plan.moves:
        return [local.narrow(dim, 0, 0) for _ in needs[0]]
    order, device = plan.order, local.device
    fetched = [torch.empty_permuted(shape, order, dtype=local.dtype, device=device) for shape in plan.shapes]
    for (lo, hi), part in plan.own:
        place = fetched[part.interval].narrow(dim, part.start, part.stop - part.start)
        place.copy_(local.narrow(dim, lo, hi - lo))
    if comm.size > 1:
        sends = [[local.narrow(dim, lo, hi - lo).permute(order) for lo, hi in cut] for cut in plan.sends]
        key = None  # rows of this call alone
        if local.is_floating_point() and op not in AT_ONCE:
            key = (*plan.key, local.dtype)
        together = []
        if plan.whole is not None:
            landing = [fetched[interval].as_strided((numel,), (1,)) for interval, numel in plan.whole]
        else:
            places = [[fetched[p.interval].permute(order)[p.start : p.stop] for p in parts] for parts in plan.recvs]
            landing = [_buffer(parts) for parts in places]
            together = _of_several(places, landing)
        _exchange(comm, Batch(op, plan.to, _messages(sends), plan.source, landing, device, key), together)
    return fetched


def _empty_rows(like: Tensor, dim: int, rows: int, order: list[int]) -> Tensor:
    """Rows to be filled, in the order of the wire. No view: autograd lets nobody write to a view made in an op."""
    shape = [rows if d == dim else n for d, n in enumerate(like.shape)]
    return torch.empty_permuted(shape, order, dtype=like.dtype, device=like.device)


@collective("return_rows")
def _return(
    pieces: Sequence[Tensor],
    dim: int,
    bounds: Sequence[int],
    needs: Sequence[int],
    name: str,
    op: str,
    channels_last: bool,
) -> Tensor:
    comm = communicator_of(name)
    order = wire_order(pieces[0].ndim, dim, channels_last)
    wires = [piece.permute(order) for piece in pieces]
    total = wires[0].new_zeros((bounds[comm.rank + 1] - bounds[comm.rank], *wires[0].shape[1:]))
    add_rows(total, wires, plan_of(bounds, needs, comm), comm, op)
    return total.permute(_inverse(order))


def add_rows(total: Tensor, wires: Sequence[Tensor], plan: TransferPlan, comm: Communicator, op: str) -> None:
    """Send rows of gradient back to their owners, and add those that come; all in the order of the wire."""
    for (lo, hi), part in plan.own:
        total[lo:hi] += wires[part.interval][part.start : part.stop]
    sends = [(peer, [wires[p.interval][p.start : p.stop] for p in parts]) for peer, parts in plan.recvs]
    landing = [(peer, [total.new_empty((hi - lo, *total.shape[1:])) for lo, hi in cut]) for peer, cut in plan.sends]
    if comm.size > 1:
        outgoing, places = _messages([parts for _, parts in sends]), [parts for _, parts in landing]
        to, source = [peer for peer, _ in sends], [peer for peer, _ in landing]
        buffers = [_buffer(parts) for parts in places]
        batch = Batch(op, to, outgoing, source, buffers, total.device)
        _exchange(comm, batch, _of_several(places, buffers))
    for (_, cut), (_, landed) in zip(plan.sends, landing, strict=True):
        for (lo, hi), rows in zip(cut, landed, strict=True):
            total[lo:hi] += rows


def _of_several(places: Sequence[list[Tensor]], messages: Sequence[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
    """Messages of several parts, with the places of these."""
    return [(parts, message) for parts, message in zip(places, messages, strict=True) if len(parts) > 1]


def _exchange(comm: Communicator, batch: Batch, together: Sequence[tuple[list[Tensor], Tensor]]) -> None:
    """Send and receive, or only begin to, one message a peer: NCCL has no tags to tell several apart.

    ``together``: messages whose parts belong to several places.
    """
    if _thread.begun is not None:
        _thread.begun.append(comm.begin(batch, *([partial(_unpack, together)] if together else [])))
        return
    comm.transport(batch.device).exchange(batch)
    _unpack(together)


def _unpack(together: Sequence[tuple[list[Tensor], Tensor]]) -> None:
    """Put what came in one message where its parts belong."""
    for parts, message in together:
        sizes = [part.numel() for part in parts]
        for part, rows in zip(parts, message.split(sizes), strict=True):
            part.copy_(rows.view(part.shape))


def simulate(comm: Communicator, op: str, sent_rows: int, to: int, source: int, like: Tensor, dim: int) -> None:
    """Record what a rank of a simulated group would send."""
    if to or source:
        a_row = math.prod(n for d, n in enumerate(like.shape) if d != dim)
        comm.planned("p2p", op, sent_rows * a_row * like.element_size(), to)


def _messages(messages: list[list[Tensor]]) -> list[Tensor]:
    """Each flat: as its rows stand, or all copied one behind the other, at once."""
    if len(messages) == 1 and len(messages[0]) == 1:
        return [messages[0][0].contiguous().view(-1)]
    if all(len(parts) == 1 and parts[0].is_contiguous() for parts in messages):
        return [parts[0].view(-1) for parts in messages]
    rows = [part for parts in messages for part in parts]
    packed = rows[0].new_empty((sum(map(len, rows)), *rows[0].shape[1:]))
    torch.cat(rows, out=packed)  # which would keep the rows' memory format else
    return list(packed.view(-1).split([sum(part.numel() for part in parts) for parts in messages]))


def _buffer(parts: list[Tensor]) -> Tensor:
    """Where a message lands: straight in its rows, which are contiguous on the wire."""
    if len(parts) == 1:
        return parts[0].view(-1)
    return parts[0].new_empty(sum(part.numel() for part in parts))


def plan_of(bounds: Sequence[int], needs: Sequence[int], comm: Communicator) -> TransferPlan:
    return plan_transfer(tuple(bounds), grouped_needs(tuple(needs), comm.size), comm.rank)


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


@torch.library.register_fake(_fetch)
def _(
    local: Tensor,
    dim: int,
    bounds: Sequence[int],
    needs: Sequence[int],
    name: str,
    op: str,
    channels_last: bool,
) -> list[Tensor]:
    comm = communicator_of(name)
    order = wire_order(local.ndim, dim, channels_last)
    plan = plan_of(bounds, needs, comm)
    sent_rows = sum(hi - lo for _, cut in plan.sends for lo, hi in cut)
    simulate(comm, op, sent_rows, len(plan.sends), len(plan.recvs), local, dim)
    return [_empty_rows(local, dim, n, order) for n in plan.rows]


@torch.library.register_fake(_return)
def _(
    pieces: Sequence[Tensor],
    dim: int,
    bounds: Sequence[int],
    needs: Sequence[int],
    name: str,
    op: str,
    channels_last: bool,
) -> Tensor:
    order = wire_order(pieces[0].ndim, dim, channels_last)
    comm = communicator_of(name)
    rank, plan = comm.rank, plan_of(bounds, needs, comm)
    sent_rows = sum(part.stop - part.start for _, parts in plan.recvs for part in parts)
    simulate(comm, op, sent_rows, len(plan.recvs), len(plan.sends), pieces[0], dim)
    rest = pieces[0].permute(order).shape[1:]
    total = pieces[0].new_empty((bounds[rank + 1] - bounds[rank], *rest))
    return total.permute(_inverse(order))


def _fetch_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    local, *ctx.plan = inputs
    ctx.name = ctx.plan[NAME]
    ctx.shapes = [piece.shape for piece in output]
    ctx.like = local.new_empty(0)


def _fetch_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    given = [ctx.like.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, ctx.shapes, strict=True)]
    return _return(given, *ctx.plan), None, None, None, None, None, None


def _return_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.plan = inputs[1:]
    ctx.name = ctx.plan[NAME]


def _return_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _fetch(grad, *ctx.plan), None, None, None, None, None, None


torch.library.register_autograd(_fetch, _fetch_backward, setup_context=_fetch_setup)
torch.library.register_autograd(_return, _return_backward, setup_context=_return_setup)
