"""Sums of products by the names of their dims: which rows an operand is needed in, and what is summed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from distpatch.comm import collectives
from distpatch.rules.core.operands import check_group, precise, redistribute, sum_ranks, whole_operand, wrap
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated

Labels = Sequence[Hashable]


def contract(
    func: Any, run: Callable[..., Tensor], operands: Sequence[Tensor], labels: Sequence[Labels], out: Labels
) -> Any:
    """``run(*operands)``, whose dims are labelled like an einsum's, where some operands are sharded.

    One sharded label leads: operands that have it are brought to its rows, the others are used whole. Where
    the result has that label it is sharded along it; else the ranks' results are partial, and are added. A
    label that leads may stand in an operand once.
    """
    found = _lead(operands, labels, out)
    if found is None:  # every sharded dim is a single row that is broadcast
        return run(*map(gather_replicated, operands))
    lead, label = found

    def to_rows(tensor: Tensor, own: Labels) -> Tensor:
        if isinstance(tensor, PatchTensor):
            check_group(tensor, lead, func)
        at = own.index(label) if label in own else None
        if at is None or tensor.shape[at] != lead.row_layout.size:
            return whole_operand(tensor, lead, func)
        layout, comm = lead.row_layout.with_dim(at), lead.comm
        if isinstance(tensor, PatchTensor):
            return redistribute(tensor, layout, func).local
        return collectives.shard_rows(tensor, layout, comm.rank, comm.name)

    result = run(*collectives.join_gradients(list(map(to_rows, operands, labels))))
    if label in out:
        return wrap(result, lead, lead.row_layout.with_dim(out.index(label)))
    return sum_ranks(result.to(precise(result.dtype)), lead, func).to(result.dtype)


def _lead(operands: Sequence[Tensor], labels: Sequence[Labels], out: Labels) -> tuple[PatchTensor, Hashable] | None:
    """The operand and the sharded label that lead: the outermost that the result has, else the first."""
    sizes: dict[Hashable, int] = {}
    for tensor, own in zip(operands, labels):
        for label, n in zip(own, tensor.shape, strict=True):
            sizes[label] = max(sizes.get(label, n), n)
    found = [
        (tensor, own[tensor.row_layout.dim])
        for tensor, own in zip(operands, labels)
        if isinstance(tensor, PatchTensor) and tensor.row_layout.size == sizes[own[tensor.row_layout.dim]]
    ]
    return min(found, key=lambda item: out.index(item[1]) if item[1] in out else len(out), default=None)
