"""Products, by the names of their dims: rows of the left stay, the right is needed whole, a shared dim is summed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.comm.collectives import join_gradients, shard_rows
from distpatch.lazy.row_patches import with_dummy_row
from distpatch.rules.core.operands import check_group, precise, replicated_operand, sum_ranks, whole_operand
from distpatch.rules.core.redistribution import redistribute
from distpatch.rules.core.registry import named, rule
from distpatch.rules.core.wrapping import no_rows, wrap
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
        return shard_rows(tensor, layout, comm.rank, comm.name)

    result = run(*join_gradients(list(map(to_rows, operands, labels))))
    if torch.is_autocast_enabled(result.device.type):
        result = result.to(_dtype(run, operands))
    if label in out:
        return wrap(result, lead, lead.row_layout.with_dim(out.index(label)))
    return sum_ranks(result.to(precise(result.dtype)), lead, func).to(result.dtype)


def _dtype(run: Callable[..., Tensor], operands: Sequence[Tensor]) -> torch.dtype:
    """Of the result on one device: of a single row, which a rank may have, an einsum is no product for autocast."""
    small = [torch.zeros([min(n, 2) for n in t.shape], dtype=t.dtype, device=t.device) for t in operands]
    return run(*small).dtype


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


def batched(tensor: Tensor, *last: str) -> Labels:
    """Batch dims, which broadcasting counts from the back, and the names of the last."""
    return [*range(-(tensor.ndim - len(last)), 0), *last]


def longest(*labels: Labels) -> list[Any]:
    """The batch dims of a result."""
    return max(([d for d in own if isinstance(d, int)] for own in labels), key=len)


@rule(torch.linalg.matmul, *named("matmul", "bmm", "mm", "mv", "dot", "__matmul__"), any_order=True)
def matmul(func: Any, left: Tensor, right: Tensor) -> Any:
    """(..., N, K) @ (..., K, M); either may be a vector (K)."""
    if left.ndim == 0 or right.ndim == 0:
        return NotImplemented
    if (
        isinstance(left, PatchTensor)
        and left.row_layout.dim == left.ndim - 2
        and not isinstance(right, PatchTensor)
        and right.ndim == 2
    ):
        return wrap(func(*join_gradients([left.local, replicated_operand(right, left)])), left)
    rows = batched(left, "n", "k") if left.ndim > 1 else ["k"]
    columns = batched(right, "k", "m") if right.ndim > 1 else ["k"]
    out = [*longest(rows, columns), *(d for d in (*rows[-2:], *columns[-2:]) if d in {"n", "m"})]
    return contract(func, func, [left, right], [rows, columns], out)


@rule(F.linear, any_order=True)
def linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if isinstance(input, PatchTensor) and not isinstance(weight, PatchTensor) and input.row_layout.dim < input.ndim - 1:
        parameters = [replicated_operand(t, input) for t in (weight, bias) if t is not None]
        rows = with_dummy_row(input.local, input.row_layout.dim)  # kernels for quantised weights refuse to have none
        result = func(*join_gradients([rows, *parameters]))
        return wrap(result if rows is input.local else no_rows(result, input.local, input.row_layout.dim), input)
    columns: Labels = ["m", "k"] if weight.ndim == 2 else ["k"]
    labels = batched(input, "k")
    out = [*labels[:-1], *columns[:-1]]
    result = contract(func, func, [input, weight], [labels, columns], out)
    return result if bias is None else (result + bias).to(result.dtype)  # once, not by every rank


@rule(F.bilinear, any_order=True)
def bilinear(func: Any, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    labels = [batched(input1, "i"), batched(input2, "j"), ["o", "i", "j"]]

    def sums(*operands: Tensor) -> Tensor:
        """In the widest dtype of all, in autocast too. Torch's own refuses a rank without rows."""
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in operands))
        with torch.autocast(weight.device.type, enabled=False):
            return torch.einsum("...i,...j,oij->...o", *(t.to(dtype) for t in operands))

    result = contract(func, sums, [input1, input2, weight], labels, [*labels[0][:-1], "o"])
    return result if bias is None else result + bias


@rule(*named("inner"), any_order=True)
def inner(func: Any, input: Tensor, other: Tensor) -> Any:
    if input.ndim == 0 or other.ndim == 0:
        return input * other
    left = [f"n{d}" for d in range(input.ndim - 1)]
    right = [f"m{d}" for d in range(other.ndim - 1)]
    return contract(func, func, [input, other], [[*left, "k"], [*right, "k"]], [*left, *right])


@rule(*named("outer", "ger"), any_order=True)
def outer(func: Any, input: Tensor, vec2: Tensor) -> Any:
    return contract(func, func, [input, vec2], [["n"], ["m"]], ["n", "m"])


@rule(torch.tensordot, any_order=True)
def tensordot(func: Any, a: Tensor, b: Tensor, dims: Any = 2, out: Any = None) -> Any:
    if isinstance(dims, Tensor) or out is not None:
        return NotImplemented
    pairs = (range(a.ndim - dims, a.ndim), range(dims)) if isinstance(dims, int) else dims
    of_a, of_b = ((d,) if isinstance(d, int) else tuple(d) for d in pairs)
    left: list[Any] = [f"n{d}" for d in range(a.ndim)]
    right: list[Any] = [f"m{d}" for d in range(b.ndim)]
    for k, (i, j) in enumerate(zip(of_a, of_b, strict=True)):
        left[i] = right[j] = k
    kept = [d for d in (*left, *right) if not isinstance(d, int)]
    return contract(func, partial(func, dims=(of_a, of_b)), [a, b], [left, right], kept)


@rule(torch.einsum, any_order=True)
def einsum(func: Any, equation: str, *operands: Any) -> Any:
    """A sharded letter of the result stays sharded, one that is summed over is summed over ranks."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    parsed = _parse(equation, [tensor.ndim for tensor in operands])
    if parsed is None:
        return NotImplemented
    labels, out = parsed
    for tensor, own in zip(operands, labels):
        if isinstance(tensor, PatchTensor) and any(
            list(other).count(own[tensor.row_layout.dim]) > 1 for other in labels
        ):  # a diagonal over the rows
            return NotImplemented
    return contract(func, partial(func, equation), operands, labels, out)


def _parse(equation: str, ndims: list[int]) -> tuple[list[Labels], Labels] | None:
    """The labels of the operands' dims and of the result's; None where they do not fit, for torch to say so.

    The dims of an ellipsis are numbered from the back, as broadcasting matches them.
    """
    terms, arrow, result = equation.replace(" ", "").partition("->")
    labels = [_letters(term, ndim) for term, ndim in zip(terms.split(","), ndims)]
    if len(terms.split(",")) != len(ndims) or any(len(own) != n for own, n in zip(labels, ndims)):
        return None
    broadcast = longest(*labels)
    if not arrow:
        letters = [d for own in labels for d in own if isinstance(d, str)]
        return labels, [*broadcast, *sorted(d for d in letters if letters.count(d) == 1)]
    letters_out = len(result.replace("...", ""))
    return labels, _letters(result, letters_out + (len(broadcast) if "..." in result else 0))


def _letters(term: str, ndim: int) -> Labels:
    before, dots, after = term.partition("...")
    count = ndim - len(before) - len(after) if dots else 0
    return [*before, *range(-count, 0), *after]


@rule(torch.cdist, any_order=True)
def cdist(func: Any, x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Any:
    """Distances of points, (..., N, K) and (..., M, K): of this rank's points from all the others."""
    modes = () if compute_mode is None else (compute_mode,)
    if all(t.row_layout.dim == t.ndim - 1 for t in (x1, x2) if isinstance(t, PatchTensor)):
        return NotImplemented
    labels = [batched(x1, "n", "k"), batched(x2, "m", "k")]
    return contract(func, lambda a, b: func(a, b, p, *modes), [x1, x2], labels, [*longest(*labels), "n", "m"])
