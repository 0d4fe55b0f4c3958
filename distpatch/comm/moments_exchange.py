"""The moments of a norm, which every rank needs of every other, and with them rows of the neighbours: in one round.

A convolution often reads what a norm has made. Its halo would be a round of its own, which cannot begin before the
moments have come. As it stands before the norm it can go with them; it is normalised where it lands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distpatch.comm.collectives import stack_ranks
from distpatch.comm.communicator import communicator_of
from distpatch.comm.row_exchange import is_plain
from distpatch.comm.transport import Batch
from distpatch.layout.rows import Bounds, Needs
from distpatch.layout.stencil import Interval
from distpatch.layout.transfers import flat_needs, grouped_needs, plan_transfer, wire_order
from distpatch.torch_utils.operators import collective
from distpatch.torch_utils.overridable import has_rules
from distpatch.torch_utils.private import foreach_copy

MOST_RANKS = 16  # beyond that each telling each is slower than a collective


class Strips(NamedTuple):
    """Rows of this rank, of which the others need some: as ``fetch_rows`` takes them."""

    rows: Tensor
    dim: int
    bounds: Bounds
    needs: Needs


def may_bring_rows(name: str, device: torch.device) -> bool:
    """Whether ``gather_moments`` can bring rows, too; as all ranks know."""
    comm = communicator_of(name)
    return 1 < comm.size <= MOST_RANKS and comm.transport(device).carries_rows()


def gather_moments(
    counts: Sequence[int], own: Sequence[Tensor], dtype: torch.dtype, name: str, op: str, strips: Strips | None
) -> tuple[Sequence[int], Tensor, Tensor | None]:
    """What a normalisation's statistics are merged of (``merge_deviations``): how many samples, and their moments.

    ``counts``: how many samples each rank has; ``own``: mean and deviation of this rank's. All ranks', (ranks, 2, ...)
    in ``dtype``, or what the transport knows instead. With ``strips`` the rows that this rank needs, too, one behind
    the other; without derivatives then.
    """
    if strips is not None:
        if is_plain(strips.rows) and is_plain(own[0]):
            ranks, rows = _gathered(own, *strips, name, op, dtype)
        else:
            given = strips.rows, strips.dim, list(strips.bounds), flat_needs(strips.needs), name, op, dtype
            ranks, rows = _gather_moments(list(own), *given)
        return counts, ranks, rows
    if any(map(has_rules, own)):  # sharded over an inner axis
        both = torch.stack([t.to(dtype) for t in own])
    else:
        both = own[0].new_empty((2, *own[0].shape), dtype=dtype)
        foreach_copy(list(both.unbind(0)), list(own))
    known = communicator_of(name).transport(both.device).known_moments(counts, both, op)
    return *((counts, stack_ranks(both, name, op)) if known is None else known), None


class _Plan(NamedTuple):
    """A rank's part: found once for calls that are alike.

    ``order``: of the dims on the wire, ``back``: from there; ``row``: the shape of a row there; ``peers``: all others,
    of which each gets the rows ``cuts`` and sends so many as ``landing`` says; ``pieces``: in the order in which rows
    are needed, whose message they come in, and which of its rows they are.
    """

    order: list[int]
    back: list[int]
    row: list[int]
    peers: list[int]
    cuts: list[tuple[Interval, ...]]
    landing: list[int]
    pieces: list[tuple[int, Interval]]


@lru_cache(maxsize=4096)
def _plan(shape: torch.Size, dim: int, bounds: Bounds, needs: Needs, rank: int) -> _Plan:
    plan, order = plan_transfer(bounds, needs, rank), wire_order(len(shape), dim, True)
    peers = [peer for peer in range(len(needs)) if peer != rank]
    sends, recvs = dict(plan.sends), dict(plan.recvs)
    found, landing = [], []
    for index, peer in enumerate(peers):
        at = 0
        for part in recvs.get(peer, ()):
            stop = at + part.stop - part.start
            found.append(((part.interval, part.start), (index, (at, stop))))
            at = stop
        landing.append(at)
    back = sorted(range(len(order)), key=order.__getitem__)
    cuts, row = [sends.get(peer, ()) for peer in peers], [shape[d] for d in order[1:]]
    return _Plan(order, back, row, peers, cuts, landing, [place for _, place in sorted(found)])


def _gathered(
    own: Sequence[Tensor],
    local: Tensor,
    dim: int,
    bounds: Bounds,
    needs: Needs,
    name: str,
    op: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """One message to each other rank: its moments, and behind these the rows that it needs, as they are on the wire."""
    comm, device = communicator_of(name), local.device
    plan, shape = _plan(local.shape, dim, bounds, needs, comm.rank), own[0].shape
    ranks = torch.empty((comm.size, 2, *shape), dtype=dtype, device=device)
    head, row_bytes = 2 * shape.numel() * dtype.itemsize, math.prod(plan.row) * local.dtype.itemsize

    def messages(rows: Sequence[int]) -> list[Tensor]:
        return [torch.empty(head + count * row_bytes, dtype=torch.uint8, device=device) for count in rows]

    def moments_in(message: Tensor) -> Tensor:
        return message[:head].view(dtype).view(2, *shape)

    def rows_in(message: Tensor) -> Tensor:
        return message[head:].view(local.dtype).view(-1, *plan.row)

    outgoing, incoming = messages([_rows_of(cut) for cut in plan.cuts]), messages(plan.landing)
    places = [ranks[comm.rank], *map(moments_in, outgoing)]
    foreach_copy([t for place in places for t in place.unbind(0)], [*own] * len(places))
    for message, cut in zip(outgoing, plan.cuts):
        at = 0
        for lo, hi in cut:
            rows_in(message)[at : at + hi - lo].copy_(local.narrow(dim, lo, hi - lo).permute(plan.order))
            at += hi - lo
    comm.transport(device).exchange(Batch(op, plan.peers, outgoing, plan.peers, incoming, device))
    foreach_copy([ranks[peer] for peer in plan.peers], list(map(moments_in, incoming)))
    pieces = [rows_in(incoming[index])[lo:hi] for index, (lo, hi) in plan.pieces]
    rows = torch.cat(pieces) if len(pieces) != 1 else pieces[0]
    return [ranks, rows.permute(plan.back)]


def _rows_of(cut: Sequence[Interval]) -> int:
    return sum(hi - lo for lo, hi in cut)


@collective("gather_moments")
def _gather_moments(
    own: Sequence[Tensor],
    local: Tensor,
    dim: int,
    bounds: Sequence[int],
    needs: Sequence[int],
    name: str,
    op: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    grouped = grouped_needs(tuple(needs), communicator_of(name).size)
    return _gathered(own, local, dim, tuple(bounds), grouped, name, op, dtype)


@torch.library.register_fake(_gather_moments)
def _(
    own: Sequence[Tensor],
    local: Tensor,
    dim: int,
    bounds: Sequence[int],
    needs: Sequence[int],
    name: str,
    op: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    comm = communicator_of(name)
    plan = _plan(local.shape, dim, tuple(bounds), grouped_needs(tuple(needs), comm.size), comm.rank)
    ranks = own[0].new_empty((comm.size, 2, *own[0].shape), dtype=dtype)
    moments = len(plan.peers) * ranks[0].numel() * ranks.element_size()
    rows = sum(map(_rows_of, plan.cuts)) * math.prod(plan.row) * local.element_size()
    comm.planned("p2p", op, moments + rows, len(plan.peers))
    return [ranks, local.new_empty((sum(plan.landing), *plan.row)).permute(plan.back)]
