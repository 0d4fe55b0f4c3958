"""Attention and matrix products: rows of the left operand stay, what they meet is gathered or summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.oracle import H, case, random_tensor

Q, KV, SHORT = (2, 3, H, 4), (2, 3, H, 4), (2, 3, 5, 4)
X = (2, H, 6)


def sdpa(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, mask, **options)


def allowed(*shape: int) -> Callable[[int], Tensor]:
    """A boolean mask (H stands for the rows) in which every query may see the first key."""

    def make(rows: int) -> Tensor:
        mask = random_tensor(tuple(rows if n == H else n for n in shape), seed=9) > 0
        mask[..., 0] = True
        return mask

    return make


def self_attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    """As in a VAE's mid block: pixels become tokens, attend to each other, and become pixels again."""
    batch, channels, height, width = x.shape
    tokens = x.view(batch, channels, height * width).transpose(1, 2)
    heads = [F.linear(tokens, w).view(batch, -1, 2, channels // 2).transpose(1, 2) for w in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(batch, -1, channels)
    return x + F.linear(out, o).transpose(-1, -2).reshape(batch, channels, height, width)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.exp().transpose(-1, -2) @ v)


CASES = {
    "attention": case(sdpa(), Q, KV, KV, sharded=3, p2p=1),
    "scale": case(sdpa(scale=0.3), Q, KV, KV, sharded=3),
    "single head": case(sdpa(), (2, H, 4), (2, H, 4), (2, H, 4), sharded=3),
    "values of other width": case(sdpa(), Q, KV, (2, 3, H, 7), sharded=3),
    "keys plain": case(sdpa(), Q, SHORT, SHORT, p2p=0),
    "keys sharded, values plain": case(sdpa(), Q, KV, KV, sharded=2),
    "queries plain": case(lambda k, v, q: F.scaled_dot_product_attention(q, k, v), KV, KV, SHORT, sharded=2),
    "float mask": case(sdpa(), Q, KV, KV, (H, H), sharded=3),
    "float mask per head": case(sdpa(), Q, KV, KV, (2, 3, H, H), sharded=3),
    "float mask of one row": case(sdpa(), Q, KV, KV, (2, 1, 1, H), sharded=3),
    "float mask, keys plain": case(sdpa(), Q, SHORT, SHORT, (H, 5)),
    "bool mask": case(sdpa(), Q, KV, KV, allowed(H, H), sharded=3),
    "bool mask per batch": case(sdpa(), Q, KV, KV, allowed(2, 1, H, H), sharded=3),
    "bool mask of one row": case(sdpa(), Q, KV, KV, allowed(1, H), sharded=3),
    "mask sharded": case(sdpa(), Q, KV, KV, (2, 3, H, H), sharded=4),
    "causal": case(sdpa(is_causal=True), Q, KV, KV, sharded=3),
    "causal, keys plain": case(sdpa(is_causal=True), Q, SHORT, SHORT),
    "grouped queries": case(sdpa(enable_gqa=True), (2, 4, H, 4), (2, 2, H, 4), (2, 2, H, 4), sharded=3),
    "heads sharded": case(sdpa(), (2, H, 5, 4), (2, H, 5, 4), (2, H, 5, 4), sharded=3, dim=1),
    "mid block": case(self_attention, (2, 4, H, 3), (4, 4), (4, 4), (4, 4), (4, 4)),
    "linear attention": case(linear_attention, Q, KV, KV, sharded=3),
    # Matrix products.
    "linear": case(F.linear, X, (5, 6), (5,), p2p=0),
    "linear without bias": case(F.linear, X, (5, 6)),
    "linear over the rows": case(lambda x, w: F.linear(x, w), (2, 6, H), (5, H), dim=-1),
    "rows @ plain": case(torch.matmul, X, (6, 5), p2p=0),
    "rows @ plain batch": case(lambda a, b: a @ b, X, (2, 6, 5)),
    "rows @ plain of more dims": case(torch.matmul, X, (3, 2, 6, 4)),
    "plain @ columns": case(lambda x, a: a @ x, (2, 6, H), (5, 6), dim=-1, p2p=0),
    "plain @ rows": case(lambda x, a: a @ x, (2, H, 6), (5, H)),
    "contraction": case(lambda a, b: a.transpose(-1, -2) @ b, X, X, sharded=2),
    "contraction of other layouts": case(lambda a, b: a.mT.matmul(b), X, (2, H, 3), sharded=2),
    "bmm": case(torch.bmm, (3, H, 6), (3, 6, 4)),
    "mm": case(torch.mm, (H, 6), (6, 4)),
    "both left": case(lambda a, b: a @ b.transpose(-1, -2), X, X, sharded=2),
    "batch dim": case(torch.matmul, (H, 3, 4), (H, 4, 2), sharded=2, dim=0),
    "vector": case(torch.matmul, X, (6,)),
    "einsum": case(lambda x, w: torch.einsum("bnc,dc->bnd", x, w), X, (5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention(case: Callable[[], None]) -> None:
    case()
