"""Halo rows fetched together with a rank's own rows, for autograd: their gradients are added in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.communicator import communicator_of
from distpatch.comm.row_exchange import NAME, add_rows, alias, fetch_rows, plan_of, simulate
from distpatch.layout.rows import Bounds, Needs
from distpatch.layout.stencil import Interval
from distpatch.layout.transfers import flat_needs, wire_order
from distpatch.torch_utils.operators import collective
from distpatch.torch_utils.overridable import overridable


@overridable
def fetch_around(
    local: Tensor,
    strips: Sequence[Interval],
    dim: int,
    bounds: Bounds,
    needs: Needs,
    name: str,
    op: str,
    channels_last: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The rank's own rows, strips of these (local rows, copied), and the rows that it needs of others; with gradients.

    For the graph it is one operation, whose backward runs on every rank that uses any of them, as a collective must,
    and whose gradient is one copy of that of the own rows, with all others added: a gradient of as many rows for each
    strip and for the exchange would be three more.
    """
    own, *others = _Around.apply(local, tuple(strips), dim, bounds, needs, name, op, channels_last)
    return own, others[: len(strips)], others[len(strips) :]


class _Around(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, strips: tuple[Interval, ...], *plan: Any) -> tuple[Tensor, ...]:
        ctx.plan, ctx.name = (strips, *plan), plan[NAME]
        copied = [local.narrow(plan[0], lo, hi - lo).clone() for lo, hi in strips]
        return alias(local), *copied, *fetch_rows(local, *plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _ReturnAround.apply(ctx.plan, *grads), *[None] * len(ctx.plan)


class _ReturnAround(torch.autograd.Function):
    """The transpose of ``_Around``; each is the other's backward."""

    @staticmethod
    def forward(ctx: Any, plan: tuple[Any, ...], grad: Tensor, *others: Tensor) -> Tensor:
        strips, dim, bounds, needs, name, op, channels_last = plan
        ctx.plan, ctx.name = plan, name
        of_strips, pieces = others[: len(strips)], list(others[len(strips) :])
        total: Tensor = _add_returned(grad, pieces, dim, list(bounds), flat_needs(needs), name, op, channels_last)
        for (lo, hi), rows in zip(strips, of_strips, strict=True):
            total.narrow(dim, lo, hi - lo).add_(rows)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Around.apply(grad, *ctx.plan)


@collective("add_returned_rows")
def _add_returned(
    grad: Tensor,
    pieces: Sequence[Tensor],
    dim: int,
    bounds: Sequence[int],
    needs: Sequence[int],
    name: str,
    op: str,
    channels_last: bool,
) -> Tensor:
    comm = communicator_of(name)
    order = wire_order(grad.ndim, dim, channels_last)
    total = grad.clone()
    add_rows(total.permute(order), [piece.permute(order) for piece in pieces], plan_of(bounds, needs, comm), comm, op)
    return total


@torch.library.register_fake(_add_returned)
def _(grad: Tensor, pieces: Sequence[Tensor], *plan_given: Any) -> Tensor:
    dim, bounds, needs, name, op, _ = plan_given
    comm = communicator_of(name)
    plan = plan_of(bounds, needs, comm)
    sent_rows = sum(part.stop - part.start for _, parts in plan.recvs for part in parts)
    simulate(comm, op, sent_rows, len(plan.recvs), len(plan.sends), grad, dim)
    return torch.empty_like(grad)
