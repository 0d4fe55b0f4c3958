"""Attention over the sharded dim: queries stay, keys and values are fetched from all ranks.

``convert_model(attention=)`` says how: all at once, one rank's after the other (ring_attention.py), or turned to heads;
"auto": whichever of them the sizes speak for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.comm.collectives import join_gradients
from distpatch.layout.blocks import BlockLayout
from distpatch.layout.rows import RowLayout
from distpatch.layout.stencil import ceil_div
from distpatch.lazy.row_patches import empty_beside, in_patches, with_dummy_row
from distpatch.rules.core.operands import (
    autocast,
    check_group,
    local_rows_of,
    local_slice,
    needs_grad,
    precise,
    whole_operand,
)
from distpatch.rules.core.redistribution import gather_partial, in_order, redistribute
from distpatch.rules.core.registry import rule
from distpatch.rules.core.wrapping import no_rows, on_some_rows, wrap
from distpatch.rules.linalg.kept_scores import keeps_scores, planned
from distpatch.rules.linalg.matmul import batched, contract
from distpatch.rules.linalg.ring_attention import ring
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated

# Without gradients keys and values are gathered for a few heads at a time, and scores, where torch's kernel keeps
# them, are made for a few queries at a time: no more bytes of either than these.
GATHER_BYTES = 256 << 20
SCORE_BYTES = 512 << 20
ROUND_BYTES = 1 << 20  # that take as long to send as a round more (of NVLink's data sheet; not measured)


class Call(NamedTuple):
    """``query``: (..., heads, N, d), ``key``: (..., heads, M, d), ``value``: (..., heads, M, e)."""

    func: Any
    query: Any
    key: Any
    value: Any
    mask: Tensor | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool = False


@rule(F.scaled_dot_product_attention, any_order=True, of_many_kernels=True)
def attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    orderly = is_causal and attn_mask is None and dropout_p == 0
    if orderly and isinstance(query, PatchTensor) and query.row_layout.dim == query.ndim - 2:
        query = in_order(query)
    if not any(isinstance(t, PatchTensor) for t in (query, key, value)):  # a sharded mask alone
        more = {"scale": scale, "enable_gqa": enable_gqa}
        return func(query, key, value, gather_replicated(attn_mask), dropout_p, is_causal, **more)  # type: ignore[arg-type]
    if dropout_p > 0:
        return NotImplemented
    if is_causal and attn_mask is not None:
        raise RuntimeError("scaled_dot_product_attention: attn_mask should not be set when is_causal=True")
    if isinstance(query, PatchTensor) and query.row_layout.dim == query.ndim - 2:
        queries: Any = query
        for _ in range(max(key.ndim, value.ndim) - query.ndim):  # the result has as many batch dims as the keys
            queries = queries.unsqueeze(0)
        return _by_rows(Call(func, queries, key, value, attn_mask, is_causal, scale, enable_gqa))
    call = Call(func, query, key, value, attn_mask, is_causal, scale)
    if enable_gqa:
        return _by_groups(call)
    operands = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    kinds = (("n", "d"), ("m", "d"), ("m", "e"), ("n", "m"))
    labels = [batched(t, *kind) for t, kind in zip(operands, kinds)]
    out = [*max(labels, key=len)[:-2], "n", "e"]
    if any(isinstance(t, PatchTensor) and own[t.row_layout.dim] in out for t, own in zip(operands, labels)):

        def attend(*mine: Tensor) -> Tensor:
            q, k, v, *mask = map(_some, mine)
            result = planned(func)(q, k, v, mask[0] if mask else None, 0.0, is_causal, scale=scale)
            empty = [(t, d - t.ndim) for t in mine for d, n in enumerate(t.shape) if n == 0]
            if not empty:
                return result
            of, dim = empty[0]
            return no_rows(result, of, result.ndim + dim)

        return contract(func, attend, operands, labels, out)
    lead = next(t for t in (query, key, value) if isinstance(t, PatchTensor))
    dtype = autocast(lead, partial(_one, func)).dtype
    with torch.autocast(query.device.type, enabled=False):
        return _by_parts(call).to(dtype)


def _some(t: Tensor) -> Tensor:
    """What an idle rank attends with: the kernel that torch chooses, and its derivatives, are those of other ranks."""
    for d, n in enumerate(t.shape):
        t = t if n else with_dummy_row(t, d, 1)
    return t


def _one(func: Any, number: Tensor) -> Tensor:
    """The attention of one number on itself."""
    return func(*[number.view(1, 1)] * 3)


def _by_groups(call: Call) -> Tensor:
    """Grouped queries as a dim of their own, over which the keys' heads are repeated."""
    func, query, key, value, mask, is_causal, scale, _ = call
    heads = key.shape[-3]
    group = query.shape[-3] // heads
    if mask is not None and mask.ndim > 2:
        mask = mask.unsqueeze(-3) if mask.shape[-3] == 1 else mask.unflatten(-3, (heads, group))
    key, value = (t.unsqueeze(-3).expand(*t.shape[:-2], group, *t.shape[-2:]) for t in (key, value))
    result = attention(func, query.unflatten(-3, (heads, group)), key, value, mask, 0.0, is_causal, scale)
    return result.flatten(-4, -3)


def _by_parts(call: Call) -> Tensor:
    """Every rank's keys on their own, where they stay: scores, their softmax and sums merge over ranks."""
    query, key, value = (t.to(precise(t.dtype)) for t in (call.query, call.key, call.value))
    scores = (query * (query.shape[-1] ** -0.5 if call.scale is None else call.scale)) @ key.transpose(-1, -2)
    mask = call.mask
    if call.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return scores.softmax(-1) @ value
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    blind = (scores == -math.inf).all(-1, keepdim=True)  # what sees no key is 0, as torch has it
    weights = scores.masked_fill(blind, 0.0).softmax(-1)
    return (weights @ value).masked_fill(blind, 0.0)


def _by_rows(call: Call) -> PatchTensor:
    """Queries stay; a few heads' keys and values at a time where all would be too many."""
    func, query, key, value, mask, *_ = call
    if torch.is_autocast_enabled(query.device.type):  # gather what will be computed with
        query = autocast(query, partial(_one, func))
        key, value = key.to(query.dtype), value.to(query.dtype)
        call = call._replace(query=query, key=key, value=value)
    way = _ways.get(query.region.options.attention)
    if way is not None and query.world_size > 1 and (result := way(call)) is not None:
        return result
    size_bytes = sum(t.numel() * t.element_size() for t in (key, value) if isinstance(t, PatchTensor))
    if size_bytes <= GATHER_BYTES:
        return wrap(_attend(call), query)
    dim, heads = max(enumerate(key.shape[:-2], -key.ndim), key=lambda item: item[1], default=(0, 1))
    alike = query.ndim == key.ndim == value.ndim and query.shape[dim] % heads == 0 and value.shape[dim] == heads
    alike = alike and all(
        n in {1, m} for t in (key, value) for d, n, m in zip(range(-t.ndim, -2), t.shape, query.shape) if d != dim
    )
    steps = min(ceil_div(size_bytes, GATHER_BYTES), heads)
    if steps < 2 or not alike or needs_grad(query, key, value, mask):
        return wrap(_attend(call), query)
    group, at_once = query.shape[dim] // heads, ceil_div(heads, steps)
    out = empty_beside(query.local, (*query.local.shape[:-1], value.shape[-1]), torch.contiguous_format)
    for lo in range(0, heads, at_once):
        count = min(at_once, heads - lo)

        def of_queries(t: Any, lo: int = lo * group, count: int = count * group) -> Any:
            return t if t is None or t.ndim < -dim or t.shape[dim] == 1 else t.narrow(dim, lo, count)

        some = of_queries(query), key.narrow(dim, lo, count), value.narrow(dim, lo, count), of_queries(mask)
        of_queries(out).copy_(_attend(Call(func, *some, *call[5:])))
    return wrap(out, query)


def _by_ring(call: Call) -> PatchTensor | None:
    """One rank's keys at a time; None where keys and values are not both sharded alike along their rows."""
    func, query, key, value, mask, is_causal, scale, grouped = call
    if not _are_tokens(key, value) or (is_causal and isinstance(key.row_layout, BlockLayout)):
        return None
    check_group(key, query, func)
    value = redistribute(value, key.row_layout, func).local
    mask = None if mask is None else _mask_rows(mask, query, func)
    if grouped:
        times = query.shape[-3] // key.shape[-3]
        key, value = wrap(key.local.repeat_interleave(times, -3), key), value.repeat_interleave(times, -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        return wrap(ring(func, query, key, value, mask, is_causal, scale, SCORE_BYTES), query)


def _by_turning(call: Call) -> PatchTensor | None:
    """Each rank gets some heads of all queries, keys and values, and gives back all heads of its own queries.

    None where they are not sharded alike, or ranks would have no head.
    """
    func, query, key, value, mask, is_causal, scale, grouped = call
    alike = _are_tokens(key, value) and query.ndim == key.ndim > 2 and query.shape[:-3] == key.shape[:-3]
    if not alike or key.shape[-3] < query.world_size or query.shape[-3] % key.shape[-3]:
        return None
    dim, times = query.ndim - 3, query.shape[-3] // key.shape[-3]
    heads = RowLayout(dim, query.region.bounds(key.shape[-3]))
    own = RowLayout(dim, tuple(b * times for b in heads.bounds))
    if query.shape == key.shape == value.shape and query.row_layout == key.row_layout == value.row_layout:
        together: Any = torch.cat([query, key, value], -1)  # one exchange
        turned = redistribute(together, heads, func).chunk(3, -1)
    else:
        turned = (redistribute(query, own, func), *(redistribute(t, heads, func) for t in (key, value)))
    q, k, v = turned
    result = attention(func, q, k, v, mask, 0.0, is_causal, scale, grouped)
    return redistribute(result, query.row_layout, func)


def _are_tokens(key: Any, value: Any) -> bool:
    """Whether keys and values are sharded along their rows, and have as many of them."""
    if not (isinstance(key, PatchTensor) and isinstance(value, PatchTensor)):
        return False
    return key.shape[:-1] == value.shape[:-1] and key.row_layout.dim == key.ndim - 2 == value.row_layout.dim


def _by_sizes(call: Call) -> PatchTensor | None:
    """Turned to heads where so many bytes fewer are sent; else by ring where all keys would be too many at once.

    None where they are gathered. By global shapes alone: all ranks choose alike.
    """
    query, key, value, ranks = call.query, call.key, call.value, call.query.world_size
    if not _are_tokens(key, value):
        return None
    result_numel = math.prod(query.shape[:-1]) * value.shape[-1]
    kept = (key.numel() + value.numel()) * key.element_size()
    turned = kept + (query.numel() + result_numel) * query.element_size()
    fewer = (ranks - 1) * (kept - turned // ranks) // ranks
    if fewer >= ROUND_BYTES and (result := _by_turning(call)) is not None:
        return result
    return _by_ring(call) if kept > GATHER_BYTES and call.mask is None and not needs_grad(query, key, value) else None


_ways: dict[str, Callable[[Call], PatchTensor | None]] = {
    "ring": _by_ring,
    "all_to_all": _by_turning,
    "auto": _by_sizes,
}


def _attend(call: Call) -> Tensor:
    """This rank's queries and everybody's keys; a few queries at a time where scores are kept and would be too many."""
    func, query, key, value, mask, is_causal, scale, grouped = call
    mask = None if mask is None else _mask_rows(mask, query, func)
    key, value = _all_keys(key, value, query, func)
    queries, key, value, *masks = join_gradients([query.local, key, value, *([] if mask is None else [mask])])
    mask = masks[0] if masks else None
    first = query.own_interval[0] if is_causal else 0
    size_bytes = math.prod(query.shape[:-2]) * key.shape[-2] * 4
    at_once = max(SCORE_BYTES // max(size_bytes, 1), 1)
    run = partial(planned(func), scale=scale, enable_gqa=grouped)

    def attend(rows: Tensor) -> Tensor:
        count = rows.shape[-2]
        tall = None if mask is None else _as_tall(mask, count)
        # Below its first row a causal mask is made here, and is as large as the scores.
        kept = first > 0 or keeps_scores(rows, key, value, tall, is_causal, grouped)
        step = at_once if kept and not needs_grad(rows, key, value, mask) else count
        if step >= count:
            return some(rows, tall, 0)
        return in_patches(lambda a, b: some(rows.narrow(-2, a, b - a), tall, a), (0, count), step, rows.ndim - 2)

    def some(rows: Tensor, mask: Tensor | None, start: int) -> Tensor:
        count = rows.shape[-2]
        if not is_causal:
            own = mask if mask is None or mask.shape[-2] in {1, count} else mask.narrow(-2, start, count)
            return run(rows, key, value, own)
        seen = min(first + start + count, key.shape[-2])
        keys, values = key.narrow(-2, 0, seen), value.narrow(-2, 0, seen)
        if first + start == 0:
            return run(rows, keys, values, is_causal=True)
        own = torch.ones(count, seen, dtype=torch.bool, device=rows.device).tril(first + start)
        return run(rows, keys, values, own)

    return on_some_rows(attend, queries, query.row_layout.dim)


def _all_keys(key: Tensor, value: Tensor, lead: PatchTensor, func: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of all ranks, in one exchange; their gradients return to the owners."""
    if not (isinstance(key, PatchTensor) and isinstance(value, PatchTensor)) or (
        key.shape[:-1] != value.shape[:-1] or key.row_layout.dim == key.ndim - 1
    ):
        return whole_operand(key, lead, func), whole_operand(value, lead, func)
    check_group(key, lead, func)
    check_group(value, lead, func)
    value = redistribute(value, key.row_layout, func)
    if lead.world_size == 1:
        return key.local, value.local
    both = gather_partial(wrap(torch.cat([key.local, value.local], -1), key), func)
    return both.narrow(-1, 0, key.shape[-1]), both.narrow(-1, key.shape[-1], value.shape[-1])


def _mask_rows(mask: Tensor, query: PatchTensor, func: Any) -> Tensor:
    """The mask's rows of this rank's queries; its other dim, the keys, is needed whole."""
    if isinstance(mask, PatchTensor) and mask.row_layout.dim == mask.ndim - 2 and mask.row_layout.size > 1:
        return local_rows_of(mask, query, -2, func)
    mask = whole_operand(mask, query, func)
    return mask if mask.shape[-2] == 1 else local_slice(mask, query, -2)


def _as_tall(mask: Tensor, rows: int) -> Tensor:
    """The mask, with a row that masks nothing for an idle rank's blank query.

    Without the mask that rank would leave the autograd graph of the mask's gradient, which is collective.
    """
    if mask.shape[-2] in {1, rows}:
        return mask
    return with_dummy_row(mask, -2, mask.dtype == torch.bool)
