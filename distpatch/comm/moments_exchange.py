"""The moments of a norm, which every rank needs of every other, and with them rows of the neighbours: in one round.

A convolution often reads what a norm has made. Its halo would be a round of its own, which cannot begin before the
moments have come. As it stands before the norm it can go with them; it is normalised where it lands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distpatch.comm.collectives import stack_ranks
from distpatch.comm.communicator import Communicator, communicator_of
from distpatch.comm.row_exchange import flat_needs, inverse_order, plan_of, wire_order
from distpatch.comm.transport import Batch
from distpatch.layout.rows import Bounds, Needs
from distpatch.layout.transfers import Part
from distpatch.torch_utils.private import NEVER_REPLAYED, foreach_copy

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
        flat = flat_needs(strips.needs)
        given = strips.rows, strips.dim, list(strips.bounds), flat, name, op, dtype
        ranks, rows = _gather_moments(list(own), *given)
        return counts, ranks, rows
    both = own[0].new_empty((2, *own[0].shape), dtype=dtype)
    foreach_copy(list(both.unbind(0)), list(own))
    known = communicator_of(name).transport(both.device).known_moments(counts, both, op)
    return *((counts, stack_ranks(both, name, op)) if known is None else known), None


class _Message(NamedTuple):
    """What one rank sends another, as bytes; and views of it: moments, and rows as they stand on the wire."""

    bytes: Tensor
    moments: Tensor
    rows: Tensor


@torch.library.custom_op("distpatch::gather_moments", mutates_args=(), tags=NEVER_REPLAYED)
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
    comm = communicator_of(name)
    plan, order = plan_of(bounds, needs, comm), wire_order(local.ndim, dim, True)
    wire, peers = local.permute(order), _peers(comm)
    ranks = own[0].new_empty((comm.size, 2, *own[0].shape), dtype=dtype)
    cuts, parts = dict(plan.sends), dict(plan.recvs)

    def message(rows: int) -> _Message:
        head = ranks[0].numel() * ranks.element_size()
        flat = torch.empty(head + rows * _row_bytes(local, dim), dtype=torch.uint8, device=local.device)
        of_rows = flat[head:].view(local.dtype).view(rows, *wire.shape[1:])
        return _Message(flat, flat[:head].view(dtype).view(ranks.shape[1:]), of_rows)

    sent = [message(sum(hi - lo for lo, hi in cuts.get(peer, ()))) for peer in peers]
    landing = [message(sum(part.stop - part.start for part in parts.get(peer, ()))) for peer in peers]
    places = [ranks[comm.rank], *(each.moments for each in sent)]
    foreach_copy([t for place in places for t in place.unbind(0)], [*own] * len(places))
    for peer, each in zip(peers, sent):
        _cut(each.rows, wire, cuts.get(peer, ()))
    outgoing, incoming = ([each.bytes for each in messages] for messages in (sent, landing))
    comm.transport(local.device).exchange(Batch(op, peers, outgoing, peers, incoming, local.device))
    foreach_copy([ranks[peer] for peer in peers], [each.moments for each in landing])
    found: dict[Part, Tensor] = {}
    for peer, each in zip(peers, landing):
        sizes = [part.stop - part.start for part in parts.get(peer, ())]
        found.update(zip(parts.get(peer, ()), each.rows.split(sizes) if sizes else ()))
    pieces = [found[part] for part in sorted(found, key=lambda part: (part.interval, part.start))]
    rows = torch.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else wire[:0].clone()
    return [ranks, rows.permute(inverse_order(order))]


def _cut(place: Tensor, wire: Tensor, intervals: Sequence[tuple[int, int]]) -> None:
    """Some rows, one interval behind the other."""
    at = 0
    for lo, hi in intervals:
        place[at : at + hi - lo].copy_(wire[lo:hi])
        at += hi - lo


def _peers(comm: Communicator) -> list[int]:
    return [peer for peer in range(comm.size) if peer != comm.rank]


def _row_bytes(rows: Tensor, dim: int) -> int:
    return math.prod(n for d, n in enumerate(rows.shape) if d != dim) * rows.element_size()


@_gather_moments.register_fake
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
    plan, order = plan_of(bounds, needs, comm), wire_order(local.ndim, dim, True)
    sent_rows = sum(hi - lo for _, cut in plan.sends for lo, hi in cut)
    ranks = own[0].new_empty((comm.size, 2, *own[0].shape), dtype=dtype)
    moments = (comm.size - 1) * ranks[0].numel() * ranks.element_size()
    comm.planned("p2p", op, moments + sent_rows * _row_bytes(local, dim), comm.size - 1)
    rows = local.permute(order).new_empty((sum(plan.rows), *local.permute(order).shape[1:]))
    return [ranks, rows.permute(inverse_order(order))]
