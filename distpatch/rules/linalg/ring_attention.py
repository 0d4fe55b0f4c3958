"""``convert_model(attention="ring")``: the keys of one rank at a time, merged exactly by the logarithms of their sums.

Each rank attends with its queries to the keys of rank + 1, rank + 2, ..., and keeps of each a result and the logarithm
of what its weights were divided by: by these, results of parts of the keys add up to that of all. Without gradients
the next part travels while one is attended to, and no rank holds more of others than one rank has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distpatch.comm.collectives import join_gradients, narrow_rows
from distpatch.comm.row_exchange import begin_rows, fetch_rows
from distpatch.comm.transport import Finish
from distpatch.layout.blocks import BlockLayout
from distpatch.layout.rows import EMPTY, RowLayout, even_bounds
from distpatch.layout.stencil import Interval
from distpatch.layout.transfers import wire_order
from distpatch.lazy.row_patches import in_patches, with_dummy_row
from distpatch.rules.core.operands import needs_grad, precise
from distpatch.rules.core.wrapping import on_some_rows
from distpatch.rules.linalg.kept_scores import with_sums
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.op_names import op_name

UNSEEN = -1e30  # a score that weighs nothing beside any other, and of which no difference is undefined
PARTS = 3  # of a rank's keys, of which one is attended to, one comes and one is sent
PART_BYTES = 256 << 10  # of keys and values, but where they are fewer


class Piece(NamedTuple):
    """Some keys and values of a rank: ``rows`` of those that it has."""

    owner: int
    rows: Interval
    key: Tensor
    value: Tensor


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
    kind, queries, pieces = precise(query.dtype), query.local, None
    if needs_grad(queries, key.local, value, mask):
        queries, mask, pieces = _all_at_once(func, queries, key, value, mask)

    def attend(rows: Tensor) -> Tensor:
        count = rows.shape[-2]
        tall = mask
        if tall is not None and tall.shape[-2] not in {1, count}:  # a query of an idle rank, which sees all
            tall = with_dummy_row(tall, -2, tall.dtype == torch.bool)
        out: Tensor | None = None
        total: Tensor | None = None
        for piece in _one_by_one(func, key, value) if pieces is None else pieces:
            lo, hi = piece.rows
            seen = None if tall is None else _columns(tall, key.row_layout, piece.owner)
            if is_causal:
                mine, others = (_numbers(x, rank, rows.device) for x, rank in ((query, query.rank), (key, piece.owner)))
                seen = (mine if len(mine) else mine.new_zeros(1))[:, None] >= others
            if seen is not None and seen.shape[-1] > 1:
                seen = seen.narrow(-1, lo, hi - lo)
            part = _part(rows, piece.key, piece.value, seen, scale, score_bytes)
            out, total = _merged(out, total, *(t.to(kind) for t in part))
            del piece  # before the next but one is asked for
        assert out is not None and total is not None
        return out.masked_fill(total <= UNSEEN / 2, 0.0).to(query.dtype)  # what sees no key is 0, as torch has it

    return on_some_rows(attend, queries, query.row_layout.dim)


def _all_at_once(
    func: Any, queries: Tensor, key: PatchTensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Piece]]:
    """Queries, mask, and everybody's keys and values, by one exchange, whose gradients go back in one."""
    both, size, held = torch.cat([key.local, value], -1), key.world_size, (0, *accumulate(key.row_layout.heights))
    needs = tuple(tuple(_interval(held, (r + step) % size) for step in range(1, size)) for r in range(size))
    found = fetch_rows(both, key.row_layout.dim, held, needs, key.comm.name, op_name(func), False)
    queries, *found = join_gradients([queries, both, *found, *([] if mask is None else [mask])])
    mask = found.pop() if mask is not None else None
    owners = ((key.rank + step) % size for step in range(size))
    return queries, mask, [_piece(owner, (0, t.shape[-2]), t, key.shape[-1]) for owner, t in zip(owners, found)]


def _one_by_one(func: Any, key: PatchTensor, value: Tensor) -> Iterator[Piece]:
    """The own keys and values, then a part of a rank's after the other, each asked for before the last is used."""
    size, heights = key.world_size, key.row_layout.heights
    a_row = (key.local.shape[:-2].numel()) * (key.shape[-1] + value.shape[-1]) * key.element_size()
    parts = min(PARTS, max(max(heights) * a_row // PART_BYTES, 1))
    cuts = [even_bounds(height, parts) for height in heights]
    piece = Piece(key.rank, (0, heights[key.rank]), key.local, value)
    for step in range(1, size):
        for part in range(parts):
            both, landed = _begun(func, key, value, [_interval(cut, part) for cut in cuts], step)
            yield piece
            landed()
            del landed  # and what was sent with it
            owner = (key.rank + step) % size
            piece = _piece(owner, _interval(cuts[owner], part), both, key.shape[-1])
            del both
    yield piece


def _begun(func: Any, key: PatchTensor, value: Tensor, rows: Sequence[Interval], step: int) -> tuple[Tensor, Finish]:
    """Some rows of rank + ``step``'s keys and values, side by side, and what is to be called before they are read.

    ``rows``: of each rank's own.
    """
    dim, size, (lo, hi) = key.row_layout.dim, key.world_size, rows[key.rank]
    held = (0, *accumulate(b - a for a, b in rows))
    shape = (*key.local.shape[:dim], hi - lo, key.shape[-1] + value.shape[-1])
    order = wire_order(key.ndim, dim, False)
    sent = torch.empty_permuted(shape, order, dtype=key.dtype, device=key.device)  # as it is sent: no copy more
    torch.cat([key.local.narrow(dim, lo, hi - lo), value.narrow(dim, lo, hi - lo)], -1, out=sent)
    needs = tuple((_interval(held, (rank + step) % size),) for rank in range(size))
    given = sent, dim, held, needs, key.comm.name, op_name(func), False
    if key.region.options.overlap and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        (both,), landed = begin_rows(*given)
        return both, landed
    (both,) = fetch_rows(*given)
    return both, lambda: None


def _interval(bounds: Sequence[int], index: int) -> Interval:
    return (bounds[index], bounds[index + 1]) if bounds[index] < bounds[index + 1] else EMPTY


def _piece(owner: int, rows: Interval, both: Tensor, width: int) -> Piece:
    return Piece(owner, rows, both.narrow(-1, 0, width), both.narrow(-1, width, both.shape[-1] - width))


def _part(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float, score_bytes: int
) -> tuple[Tensor, Tensor]:
    """The result over some keys, and the logarithm of the sum of the weights, (..., N, 1).

    By torch's kernel, where there are neither gradients nor a mask and it tells the sums; else by plain products.
    """
    grads = needs_grad(query, key, value, seen)
    if seen is None and not grads and (found := with_sums(query, key, value, scale)) is not None:
        return found
    query, key, value = query.to(precise(query.dtype)) * scale, key.to(precise(key.dtype)), value.to(precise(key.dtype))
    size_bytes = math.prod(query.shape[:-2]) * key.shape[-2] * query.element_size()
    at_once = max(score_bytes // max(size_bytes, 1), 1)

    def some(lo: int, hi: int) -> tuple[Tensor, Tensor]:
        own = seen if seen is None or seen.shape[-2] == 1 else seen.narrow(-2, lo, hi - lo)
        run = partial(_scored, query.narrow(-2, lo, hi - lo), key, value, own)
        if not grads:
            return run()
        result: tuple[Tensor, Tensor] = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
        return result

    return in_patches(some, (0, query.shape[-2]), at_once, query.ndim - 2)


def _scored(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
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
