"""Attention in all its forms: masks, grouped queries, chunks of heads, and torch's own modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from distpatch.rules.linalg import attention
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

Q, SHORT = (2, 3, H, 4), (2, 3, 5, 4)
GROUPED = (2, 2, H, 4)
FEW: dict[str, Any] = {"worlds": (3, 2), "heights": (7, 2)}


def sdpa(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, mask, **options)


def plain_queries(**options: Any) -> Callable[..., Tensor]:
    return lambda k, v, q, mask=None: F.scaled_dot_product_attention(q, k, v, mask, **options)


def allowed(*shape: int, blind: bool = False) -> Callable[[int], Tensor]:
    """A boolean mask in which every query may see the first key, or the last none."""

    def make(rows: int) -> Tensor:
        mask = random_tensor(tuple(rows if n == H else n for n in shape), seed=9) > 0
        mask[..., 0] = True
        if blind:
            mask[..., -1, :] = False
        return mask

    return make


def layer(module: nn.Module, **options: Any) -> Callable[..., Any]:
    """A module's own copy on every rank; its parameters are multiplied by the second argument."""
    module = module.double()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(random_tensor(tuple(parameter.shape), seed=index) * 0.3)

    def run(x: Tensor, scale: Tensor, *others: Tensor) -> Any:
        own = copy.deepcopy(module)
        weights = {name: parameter.detach() * scale for name, parameter in own.named_parameters()}
        return torch.func.functional_call(own, weights, (x, *others), options)

    return run


def mha(**made: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(8, 2, batch_first=True, **made).eval()


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of tokens on themselves."""

    def __init__(self, attention: nn.MultiheadAttention, **options: Any) -> None:
        super().__init__()
        self.attention, self.options = attention, options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        name = "attn_mask" if mask is None or mask.shape[0] != x.shape[0] or mask.ndim != 2 else "key_padding_mask"
        return self.attention(x, x, x, **{name: mask}, **self.options)


class Pixels(nn.Module):
    """Attention over the pixels of an image."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def padding(rows: int) -> Tensor:
    mask = random_tensor((2, rows), seed=3) > 0.5
    mask[:, 0] = False
    return mask


TOKENS = (2, H, 8)
NO_WEIGHTS = {"need_weights": False}
encoder_layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def of_frames(x: Tensor, *mask: Tensor) -> Tensor:
    """(B, C, T, H, W) as tokens that attend to those of all frames; the rows stay the rows."""
    tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
    out = F.scaled_dot_product_attention(tokens, tokens, tokens * 2, *mask)
    result = out.squeeze(1).unflatten(1, x.shape[2:]).movedim(-1, 1)
    assert not isinstance(x, distpatch.PatchTensor) or x.shape[-2] == 1 or result.row_layout == x.row_layout
    return result


CLIP = (2, 3, 4, H, 2)
KV = (2, 3, H, 4)


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
    "values of other width, all sharded": case(sdpa(), Q, KV, (2, 3, H, 7), sharded=3),
    "keys plain": case(sdpa(), Q, SHORT, SHORT, p2p=0),
    "keys sharded, values plain": case(sdpa(), Q, KV, KV, sharded=2),
    "queries plain, keys sharded": case(lambda k, v, q: F.scaled_dot_product_attention(q, k, v), KV, KV, SHORT, sharded=2),
    "float mask": case(sdpa(), Q, KV, KV, (H, H), sharded=3),
    "float mask per head": case(sdpa(), Q, KV, KV, (2, 3, H, H), sharded=3),
    "float mask of one row": case(sdpa(), Q, KV, KV, (2, 1, 1, H), sharded=3),
    "float mask, keys plain": case(sdpa(), Q, SHORT, SHORT, (H, 5)),
    "bool mask": case(sdpa(), Q, KV, KV, allowed(H, H), sharded=3),
    "bool mask per batch": case(sdpa(), Q, KV, KV, allowed(2, 1, H, H), sharded=3),
    "bool mask of one row": case(sdpa(), Q, KV, KV, allowed(1, H), sharded=3),
    "mask sharded": case(sdpa(), Q, KV, KV, (2, 3, H, H), sharded=4),
    "causal, all sharded": case(sdpa(is_causal=True), Q, KV, KV, sharded=3),
    "causal, keys plain": case(sdpa(is_causal=True), Q, SHORT, SHORT),
    "grouped queries": case(sdpa(enable_gqa=True), (2, 4, H, 4), (2, 2, H, 4), (2, 2, H, 4), sharded=3),
    "heads sharded": case(sdpa(), (2, H, 5, 4), (2, H, 5, 4), (2, H, 5, 4), sharded=3, dim=1),
    "mid block": case(self_attention, (2, 4, H, 3), (4, 4), (4, 4), (4, 4), (4, 4)),
    "linear attention": case(linear_attention, Q, KV, KV, sharded=3),
    "tokens of frames": case(of_frames, CLIP, p2p=1),
    "tokens of frames, mask of frames": case(of_frames, CLIP, lambda h: torch.ones(4, 4).tril().repeat_interleave(2 * h, 0).repeat_interleave(2 * h, 1).bool()),
    "tokens of frames, mask with a gradient": case(of_frames, CLIP, lambda h: random_tensor((8 * h, 8 * h), 5), **FEW),
    "values of other width": case(sdpa(), Q, Q, (2, 3, H, 7), sharded=3, p2p=1),
    "keys of other length": case(sdpa(), Q, SHORT, SHORT, p2p=0),
    "keys plain and as long": case(sdpa(), Q, Q, Q, p2p=0),
    "keys plain, values sharded": case(lambda q, v, k: F.scaled_dot_product_attention(q, k, v), Q, Q, Q, sharded=2),
    "two dims": case(sdpa(), (H, 4), (H, 4), (H, 4), sharded=3),
    "five dims": case(sdpa(), (2, 1, 3, H, 4), (2, 1, 3, H, 4), (2, 1, 3, H, 4), sharded=3, **FEW),
    "causal": case(sdpa(is_causal=True), Q, Q, Q, sharded=3),
    "causal, fewer keys": case(sdpa(is_causal=True), Q, (2, 3, 3, 4), (2, 3, 3, 4)),
    "causal, grouped": case(sdpa(is_causal=True, enable_gqa=True), (2, 4, H, 4), GROUPED, GROUPED, sharded=3, **FEW),
    "float mask, batch broadcast": case(sdpa(), Q, Q, Q, (3, H, H), sharded=3, **FEW),
    "float mask per head, sharded keys": case(sdpa(), Q, Q, Q, lambda h: random_tensor((2, 3, h, h), 5), sharded=3),
    "float mask of one row per head": case(sdpa(), Q, Q, Q, (3, 1, H), sharded=3, **FEW),
    "bool mask with a blind query": case(sdpa(), Q, Q, Q, allowed(H, H, blind=True), sharded=3, heights=(7, 2)),
    "mask sharded, keys plain": case(lambda q, m, k: F.scaled_dot_product_attention(q, k, k, m), Q, (3, H, 5), SHORT, sharded=2),
    "mask sharded by keys": case(lambda q, m: F.scaled_dot_product_attention(q, q, q, m.mT), Q, (3, H, H), sharded=2),
    "mask sharded alone": case(lambda m, q, k: F.scaled_dot_product_attention(q, k, k, m), (H, 5), Q, SHORT),
    "grouped, bool mask per head": case(
        sdpa(enable_gqa=True), (2, 4, H, 4), GROUPED, GROUPED, allowed(2, 4, H, H), sharded=3
    ),
    "dropout": case(lambda q: F.scaled_dot_product_attention(q, q, q * 0 + 1, dropout_p=1e-300), Q, heights=(7,), fallback="scaled_dot_product_attention"),
    # The queries are plain: keys and values never move.
    "queries plain": case(plain_queries(), Q, Q, SHORT, sharded=2, p2p=0),
    "queries plain, scale": case(plain_queries(scale=0.2), Q, (2, 3, H, 7), SHORT, sharded=2),
    "queries plain, causal": case(plain_queries(is_causal=True), Q, Q, SHORT, sharded=2),
    "queries plain, float mask": case(plain_queries(), Q, Q, SHORT, (3, 5, H), sharded=2),
    "queries plain, bool mask": case(plain_queries(), Q, Q, SHORT, allowed(2, 1, 5, H), sharded=2),
    "queries plain, blind query": case(plain_queries(), Q, Q, SHORT, allowed(5, H, blind=True), sharded=2),
    "queries plain, grouped": case(plain_queries(enable_gqa=True), GROUPED, GROUPED, (2, 4, 5, 4), sharded=2),
    "queries plain, values plain": case(lambda k, q, v: F.scaled_dot_product_attention(q, k, v), Q, SHORT, Q),
    "values sharded alone": case(lambda v, q, k: F.scaled_dot_product_attention(q, k, v), Q, SHORT, Q),
    # Another dim is sharded.
    "heads": case(sdpa(), (2, H, 5, 4), (2, H, 6, 4), (2, H, 6, 4), dim=1, sharded=3),
    "heads, mask per head": case(sdpa(), (2, H, 5, 4), (2, H, 6, 4), (2, H, 6, 4), (H, 5, 6), dim=1, sharded=3),
    "heads, causal": case(sdpa(is_causal=True), (2, H, 5, 4), (2, H, 5, 4), (2, H, 5, 4), dim=1, sharded=3),
    "heads, keys plain": case(sdpa(), (2, H, 5, 4), (2, H, 6, 4), (2, 1, 6, 4), dim=1, **FEW),
    "heads, grouped": case(
        lambda q, k: F.scaled_dot_product_attention(q.repeat(1, 2, 1, 1), k, k, enable_gqa=True), (2, H, 5, 4), (2, H, 6, 4), dim=1, sharded=2, heights=(4, 2)
    ),
    "batch": case(sdpa(), (H, 3, 5, 4), (H, 3, 6, 4), (H, 3, 6, 4), dim=0, sharded=3, p2p=0),
    "batch, mask": case(sdpa(), (H, 3, 5, 4), (H, 3, 6, 4), (H, 3, 6, 4), (H, 1, 5, 6), dim=0, sharded=3),
    "batch, bool mask for all": case(sdpa(), (H, 5, 4), (H, 6, 4), (H, 6, 4), allowed(5, 6), dim=0, sharded=3, **FEW),
    "width of values": case(sdpa(), (2, 5, H), (2, 6, H), (2, 6, H), dim=-1, sharded=3),
    "width of values alone": case(lambda v, q, k: F.scaled_dot_product_attention(q, k, v), (2, 6, H), (2, 5, 4), (2, 6, 4), dim=-1, p2p=0),
    "queries by rows, keys by heads": case(lambda q, k: F.scaled_dot_product_attention(q, k.transpose(1, 2), k.transpose(1, 2)), (2, H, H, 4), (2, 5, H, 4), sharded=2),
    # nn.MultiheadAttention, and the layers made of it.
    "self-attention": case(layer(SelfAttention(mha(), **NO_WEIGHTS)), TOKENS, ()),
    "self-attention with weights": case(layer(SelfAttention(mha())), TOKENS, ()),
    "self-attention, weights of each head": case(layer(SelfAttention(mha(), average_attn_weights=False)), TOKENS, (), **FEW),
    "self-attention, unbatched": case(layer(SelfAttention(mha())), (H, 8), (), **FEW),
    "self-attention, padded": case(layer(SelfAttention(mha(), **NO_WEIGHTS)), TOKENS, (), padding, heights=(7, 3)),
    "self-attention, float mask": case(layer(SelfAttention(mha())), TOKENS, (), (H, H), heights=(7, 3)),
    "self-attention, mask of each head": case(layer(SelfAttention(mha(), **NO_WEIGHTS)), TOKENS, (), (4, H, H), **FEW),
    "self-attention, no biases": case(layer(SelfAttention(mha(bias=False))), TOKENS, (), **FEW),
    "self-attention, batch sharded": case(layer(SelfAttention(mha())), (H, 5, 8), (), dim=0),
    "cross-attention": case(
        lambda x, s, k, v: layer(mha(kdim=5, vdim=6))(x, s, k, v), TOKENS, (), (2, 4, 5), (2, 4, 6), **FEW
    ),
    "cross-attention to rows": case(lambda k, s, x: layer(mha())(x, s, k, k), TOKENS, (), (2, 4, 8)),
    "encoder layer": case(layer(encoder_layer), TOKENS, ()),
    "encoder layer, evaluation": case(layer(copy.deepcopy(encoder_layer).eval()), TOKENS, ()),
    "encoder": case(layer(nn.TransformerEncoder(encoder_layer, 2).eval()), TOKENS, (), **FEW),
    "decoder layer": case(
        layer(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)), TOKENS, (), (2, 5, 8), **FEW
    ),
    "encoder of pixels": case(layer(Pixels(copy.deepcopy(encoder_layer))), (2, 8, H, 3), ()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention(case: Callable[[], None]) -> None:
    case()


def test_native_attention_never_sees_local_rows() -> None:
    """The fast path's own function has no rule: it is gathered."""
    x, w, b = random_tensor((2, 5, 8)), random_tensor((24, 8), 1), random_tensor((24,), 2)
    right = torch._native_multi_head_attention(x, x, x, 8, 2, w, b, w[:8], b[:8])[0]

    def body(rank: int) -> tuple[Tensor, int]:
        with torch.no_grad(), distpatch.trace() as t:
            s = distpatch.shard(x, dist.group.WORLD)
            out = torch._native_multi_head_attention(s, s, s, 8, 2, w, b, w[:8], b[:8])[0]
            return distpatch.gather(out), len(t.fallbacks)

    with pytest.warns(UserWarning, match="_native_multi_head_attention"):
        ranks = run_ranks(2, body)
    for out, fallbacks in ranks:
        torch.testing.assert_close(out, right)
        assert fallbacks == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": True}, {"enable_gqa": True}], ids=str)
def test_heads_and_queries_in_chunks(options: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large keys are gathered a few heads at a time, and scores, where they are kept, made for a few queries."""
    options = dict(options)
    heads = 6 if options.get("enable_gqa") else 3
    q, k, v = random_tensor((2, heads, 11, 4)), random_tensor((2, 3, 11, 4), 1), random_tensor((2, 3, 11, 5), 2)
    mask = random_tensor((heads, 11, 11), 3) if options.pop("mask", False) else None
    right = F.scaled_dot_product_attention(q, k, v, mask, **options)
    largest = {"gathered": 0, "scores": 0}
    calls = [0] * 3

    def seen(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        largest["gathered"] = max(largest["gathered"], (key.numel() + value.numel()) * 8)
        largest["scores"] = max(largest["scores"], query[..., 0].numel() * key.shape[-2] * 4)
        calls[dist.get_rank()] += 1
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(attention, "GATHER_BYTES", (k.numel() + v.numel()) * 8 // 3)
    monkeypatch.setattr(attention, "SCORE_BYTES", 2 * heads // 3 * 2 * 11 * 4)  # of two queries
    monkeypatch.setattr(attention, "keeps_scores", lambda *args: not fused)

    def body(rank: int) -> tuple[Tensor, int]:
        with torch.no_grad(), distpatch.trace() as t:
            sharded = [distpatch.shard(x, dist.group.WORLD) for x in (q, k, v)]
            out = attention.attention(seen, *sharded, mask, **options)
            return distpatch.gather(out), sum(record.op == "seen" for record in t.records)

    for out, exchanges in run_ranks(3, body):
        torch.testing.assert_close(out, right, rtol=1e-10, atol=1e-10)
        assert exchanges == 3  # one a head
    assert largest["gathered"] <= attention.GATHER_BYTES
    if fused:
        assert calls[0] == 3 and (options.get("is_causal") or calls == [3] * 3)  # one a head
    else:
        assert calls == [6] * 3  # a rank's four queries in two parts
    if not fused or options.get("is_causal"):  # whose mask is made, and as large
        assert largest["scores"] <= max(attention.SCORE_BYTES, fused * 2 * heads // 3 * 4 * 4 * 4)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": True}, {"enable_gqa": True}], ids=str)
def test_no_kernel_is_given_nothing(options: dict[str, Any], dim: int) -> None:
    """Ranks without rows compute blank ones: kernels of torch 2.11 end the process where there are no heads."""
    options = dict(options)
    q, k, v = random_tensor((3, 4, 5, 4)), random_tensor((3, 4, 5, 4), 1), random_tensor((3, 4, 5, 6), 2)
    mask = random_tensor((3, 4, 5, 5), 3) if options.pop("mask", False) else None
    if "enable_gqa" in options:
        k, v = k[:, :2], v[:, :2]
    right = F.scaled_dot_product_attention(q, k, v, mask, **options)

    def seen(*args: Any, **kwargs: Any) -> Tensor:
        shapes = [tensor.shape for tensor in args if isinstance(tensor, Tensor)]
        assert all(math.prod(shape) > 0 for shape in shapes), shapes
        return F.scaled_dot_product_attention(*args, **kwargs)

    def body(rank: int) -> tuple[Tensor, Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        bounds = [(0, 0, x.shape[dim], x.shape[dim]) for x in leaves]
        sharded = [distpatch.shard(x, dist.group.WORLD, dim=dim, bounds=b) for x, b in zip(leaves, bounds)]
        out = distpatch.gather(attention.attention(seen, *sharded, mask, **options))
        return out, torch.autograd.grad(out.square().sum(), leaves)[0]

    wanted = q.clone().requires_grad_()
    F.scaled_dot_product_attention(wanted, k, v, mask, **options).square().sum().backward()
    for out, grad in run_ranks(3, body):
        torch.testing.assert_close(out, right, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(grad, wanted.grad, rtol=1e-10, atol=1e-10)


def test_causal_and_a_mask_are_refused() -> None:
    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((2, 4, 3)), dist.group.WORLD)
        with pytest.raises(RuntimeError, match="attn_mask should not be set"):
            F.scaled_dot_product_attention(x, x, x, torch.ones(4, 4), is_causal=True)

    run_ranks(2, body)
