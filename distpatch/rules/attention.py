"""Attention over the sharded dim: queries stay, keys and values are fetched from all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.layout import RowLayout
from distpatch.rules.fallback import fallback
from distpatch.rules.registry import everything, on_some_rows, redistribute, rule, spread, wrap
from distpatch.tensor import PatchTensor, whole


@rule(F.scaled_dot_product_attention)
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
    """``query``: (..., heads, N, d), ``key`` and ``value``: (..., heads, M, d)."""
    options = {"scale": scale, "enable_gqa": enable_gqa}
    lead = next(t for t in (query, key, value, attn_mask) if isinstance(t, PatchTensor))
    if dropout_p > 0 or any(isinstance(t, PatchTensor) and t.rows.dim != t.ndim - 2 for t in (query, key, value)):
        return fallback(func, query, key, value, attn_mask, dropout_p, is_causal, **options)
    if not isinstance(query, PatchTensor):  # every rank has all queries: the result is replicated
        key, value, attn_mask = whole(key), whole(value), None if attn_mask is None else whole(attn_mask)
        return func(query, key, value, attn_mask, dropout_p, is_causal, **options)
    lo, hi = query.rows.interval(query.region.comm.rank)
    if is_causal:
        positions = torch.arange(key.shape[-2], device=query.device)
        mask: Tensor | None = positions <= torch.arange(lo, hi, device=query.device)[:, None]
    else:
        mask = _mask_rows(attn_mask, query, lo, hi, func)
    key, value = _all_keys(key, value, lead, func)

    def attend(rows: Tensor) -> Tensor:
        return func(rows, key, value, _mask_as_tall(mask, rows), **options)

    return wrap(on_some_rows(attend, query.local, query.rows.dim), query)


def _all_keys(key: Tensor, value: Tensor, lead: PatchTensor, func: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of all ranks, in one exchange; their gradients return to the owners."""
    if isinstance(key, PatchTensor) and isinstance(value, PatchTensor):
        value = redistribute(value, key.rows.with_dim(value.ndim - 2), func)
        both = wrap(torch.cat([key.local, value.local], -1), key)
        keys, values = everything(both, func).split([key.shape[-1], value.shape[-1]], -1)
        return keys, values
    key, value = (everything(t, func) if isinstance(t, PatchTensor) else spread(t, lead) for t in (key, value))
    return key, value


def _mask_rows(mask: Tensor | None, query: PatchTensor, lo: int, hi: int, func: Any) -> Tensor | None:
    """The mask's rows of this rank's queries; its other dim, the keys, is needed whole."""
    if mask is None:
        return None
    if isinstance(mask, PatchTensor) and mask.rows.dim == mask.ndim - 2 and mask.rows.size > 1:
        return redistribute(mask, RowLayout(mask.rows.dim, query.rows.bounds), func).local
    mask = everything(mask, func) if isinstance(mask, PatchTensor) else spread(mask, query)
    return mask if mask.shape[-2] == 1 else mask.narrow(-2, lo, hi - lo)


def _mask_as_tall(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """The mask, with a row that masks nothing for an idle rank's blank query.

    Without the mask that rank would leave the autograd graph of the mask's gradient, which is collective.
    """
    if mask is None or mask.shape[-2] in (1, rows.shape[-2]):
        return mask
    blank = mask.new_full((*mask.shape[:-2], 1, mask.shape[-1]), mask.dtype == torch.bool)
    return torch.cat([mask, blank], -2)
