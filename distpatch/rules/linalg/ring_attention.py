"""``convert_model(attention="ring")``: the keys of one rank at a time, merged exactly by the logarithms of their sums.

Each rank attends with its queries to the keys of rank + 1, rank + 2, ..., and keeps of each a result and the logarithm
of what its weights were divided by: by these, results of parts of the keys add up to that of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distpatch.comm.collectives import join_gradients, narrow_rows
from distpatch.comm.row_exchange import fetch_rows
from distpatch.layout.rows import EMPTY, BlockLayout, Needs, RowLayout
from distpatch.layout.stencil import Interval
from distpatch.lazy.row_patches import in_patches, with_dummy_row
from distpatch.rules.core.operands import needs_grad, on_some_rows, precise
from distpatch.rules.linalg.kept_scores import with_sums
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.op_names import op_name

UNSEEN = -1e30  # a score that weighs nothing beside any other, and of which no difference is undefined
Piece = tuple[int, Tensor]  # (whose, its keys and values side by side)


def ring(
    func: Any,
    query: PatchTensor,
    key: PatchTensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    score_bytes: int,
) -> Tensor:
    """This rank's queries and everybody's keys. ``value``: this rank's; ``mask``: its queries' rows, for all keys.

    Scores are made for as many queries at a time as make ``score_bytes`` of them, and once more in a backward pass.
    """
    width, kind = key.shape[-1], precise(query.dtype)
    both = torch.cat([key.local, value], -1)
    pieces: Any = None
    if needs_grad(query.local, both, mask):  # one exchange, whose gradients go back in one
        rest = tuple(range(1, key.world_size))
        found = fetch_rows(both, *_asked(key, rest), key.comm.name, op_name(func), False)
        queries, *found = join_gradients([query.local, both, *found, *([] if mask is None else [mask])])
        mask = found.pop() if mask is not None else None
        pieces = [((key.rank + step) % key.world_size, piece) for step, piece in enumerate(found)]
    else:
        queries = query.local

    def attend(rows: Tensor) -> Tensor:
        count = rows.shape[-2]
        tall = mask
        if tall is not None and tall.shape[-2] not in {1, count}:  # a query of an idle rank, which sees all
            tall = with_dummy_row(tall, -2, tall.dtype == torch.bool)
        out: Tensor | None = None
        total: Tensor | None = None
        for owner, piece in _fetched(func, key, both) if pieces is None else pieces:
            seen = None if tall is None else _columns(tall, key.row_layout, owner)
            if is_causal:
                mine, others = (_numbers(x, rank, rows.device) for x, rank in ((query, query.rank), (key, owner)))
                seen = (mine if len(mine) else mine.new_zeros(1))[:, None] >= others
            part = _part(rows, piece, width, seen, scale, score_bytes)
            out, total = _merged(out, total, *(t.to(kind) for t in part))
        assert out is not None and total is not None
        return out.masked_fill(total <= UNSEEN / 2, 0.0).to(query.dtype)  # what sees no key is 0, as torch has it

    return on_some_rows(attend, queries, query.row_layout.dim)


def _fetched(func: Any, key: PatchTensor, both: Tensor) -> Iterator[Piece]:
    """One rank's keys and values after the other, the own first; each is let go when the next is asked for."""
    yield key.rank, both
    for step in range(1, key.world_size):
        (piece,) = fetch_rows(both, *_asked(key, (step,)), key.comm.name, op_name(func), False)
        yield (key.rank + step) % key.world_size, piece
        del piece


def _asked(key: PatchTensor, steps: tuple[int, ...]) -> tuple[int, tuple[int, ...], Needs]:
    """Along which dim, how the keys are held, and what each rank asks for: those of the ranks so many steps on."""
    held, size = (0, *accumulate(key.row_layout.heights)), key.world_size

    def of(rank: int) -> Interval:
        lo, hi = held[rank % size], held[rank % size + 1]
        return (lo, hi) if lo < hi else EMPTY

    return key.row_layout.dim, held, tuple(tuple(of(rank + step) for step in steps) for rank in range(size))


def _part(
    query: Tensor, both: Tensor, width: int, seen: Tensor | None, scale: float, score_bytes: int
) -> tuple[Tensor, Tensor]:
    """The result over some keys, and the logarithm of the sum of the weights, (..., N, 1).

    By torch's kernel, where there are neither gradients nor a mask and it tells the sums; else by plain products.
    """
    key, value = both.narrow(-1, 0, width), both.narrow(-1, width, both.shape[-1] - width)
    if seen is None and not needs_grad(query, both) and (found := with_sums(query, key, value, scale)) is not None:
        return found
    query, both = query.to(precise(query.dtype)) * scale, both.to(precise(both.dtype))
    size_bytes = math.prod(query.shape[:-2]) * both.shape[-2] * query.element_size()
    at_once = max(score_bytes // max(size_bytes, 1), 1)
    kept = needs_grad(query, both, seen)

    def some(lo: int, hi: int) -> tuple[Tensor, Tensor]:
        own = seen if seen is None or seen.shape[-2] == 1 else seen.narrow(-2, lo, hi - lo)
        run = partial(_scored, query.narrow(-2, lo, hi - lo), both, width, own)
        if not kept:
            return run()
        result: tuple[Tensor, Tensor] = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
        return result

    return in_patches(some, (0, query.shape[-2]), at_once, query.ndim - 2)


def _scored(query: Tensor, both: Tensor, width: int, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    key, value = both.narrow(-1, 0, width), both.narrow(-1, width, both.shape[-1] - width)
    scores = query @ key.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~seen, UNSEEN) if seen.dtype == torch.bool else scores + seen.to(scores.dtype)
    total = scores.clamp(min=UNSEEN).logsumexp(-1, keepdim=True).clamp(min=UNSEEN)  # of no keys too
    return (scores - total).exp() @ value, total


def _merged(out: Tensor | None, total: Tensor | None, more: Tensor, its: Tensor) -> tuple[Tensor, Tensor]:
    if out is None or total is None:
        return more, its
    together = torch.logaddexp(total, its)
    if not torch.is_grad_enabled():  # both are this function's own
        return out.mul_((total - together).exp_()).add_(more.mul_((its - together).exp_())), together
    return out * (total - together).exp() + more * (its - together).exp(), together


def _columns(mask: Tensor, layout: RowLayout, rank: int) -> Tensor:
    """A mask's columns of one rank's keys."""
    return mask if mask.shape[-1] == 1 else narrow_rows(mask, layout.with_dim(mask.ndim - 1), rank)


def _numbers(x: PatchTensor, rank: int, device: torch.device) -> Tensor:
    """Which rows of the whole tensor a rank's are."""
    layout = x.row_layout
    assert not isinstance(layout, BlockLayout)  # a causal mask is of rows in order
    return torch.arange(*layout.interval(rank), device=device)
