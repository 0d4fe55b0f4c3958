"""Derivatives of derivatives: every rank makes the same exchanges in the same order, whoever's pieces are empty."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import distpatch
from tests.models import on_ranks
from tests.oracle import TOLERANCE, H, assert_same, case, random_tensor
from tests.strict import rendezvous
from tests.threads import run_ranks

X, TALL = (1, 4, H, 5), (9, 4)
FEW: dict[str, Any] = {"worlds": (2, 3), "heights": (7, 2), "order": 2}  # over gloo, and over the strict transport
LARGE: dict[str, Any] = FEW | {"heights": TALL}


def conv(**options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: F.conv2d(x, w, **options)


def resized(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, **options)


def padded(mode: str, *pads: int) -> Callable[[Tensor], Tensor]:
    return lambda x: F.pad(x, pads, mode)


def linear_at_the_end(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    """What stands after the activation has no derivative of its own, but torch's padding says that it has."""
    return lambda x, w: F.conv2d(F.pad(F.leaky_relu(x), (1, 1, 1, 1), mode), w).sum((1, 2, 3))


STENCILS = {
    "conv": case(conv(padding=1), X, (3, 4, 3, 3), **FEW),
    "conv, stride 2": case(conv(padding=1, stride=2), X, (3, 4, 3, 3), **FEW),
    "conv, stride 3, even kernel": case(conv(padding=2, stride=3), X, (3, 4, 4, 3), **FEW),
    "conv, dilation": case(conv(padding=2, dilation=2), X, (3, 4, 3, 3), **FEW),
    "conv, groups, channels_last": case(conv(padding=1, groups=2), X, (4, 2, 3, 3), channels_last=True, **FEW),
    "conv, third derivatives": case(conv(padding=1, stride=2), X, (3, 4, 3, 3), **FEW | {"order": 3}),
    "conv 1d, four ranks": case(
        lambda x, w: F.conv1d(x, w, padding=1), (2, 4, H), (3, 4, 3), dim=-1, **FEW | {"worlds": (4,)}
    ),
    "conv 3d": case(lambda x, w: F.conv3d(x, w, padding=1), (1, 2, 2, H, 3), (2, 2, 3, 3, 3), **FEW),
    "transposed": case(lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1), X, (4, 3, 4, 4), **FEW),
    "transposed, output padding": case(
        lambda x, w: F.conv_transpose2d(x, w, stride=3, padding=1, output_padding=1), X, (4, 3, 3, 3), **FEW
    ),
    "max pool": case(lambda x: F.max_pool2d(x, 3, 2, 1), X, **FEW),
    "max pool, only padding in a window": case(
        lambda x: F.max_pool2d(x, 2, 3, 1, 3, True), (2, 3, H, 6), **LARGE | {"worlds": (3, 4)}
    ),
    "mean pool": case(lambda x: F.avg_pool2d(x, 3, 2, 1), X, **FEW),
    "adaptive mean": case(lambda x: F.adaptive_avg_pool2d(x, (5, 1)), X, **FEW),
    "adaptive mean 1d": case(lambda x: F.adaptive_avg_pool1d(x, 3), (2, 3, H), dim=-1, **FEW),
    "adaptive max": case(lambda x: F.adaptive_max_pool2d(x, 3), X, **FEW),
    "global mean": case(lambda x: F.adaptive_avg_pool2d(x, 1), X, **FEW),
    "lp pool": case(lambda x: F.lp_pool2d(x.abs() + 1, 3, 2), X, **LARGE),
    "unfold": case(lambda x: F.unfold(x, 3, padding=1), X, **FEW),
    "fold": case(lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[-2:], 3, padding=1), X, **FEW),
    "nearest": case(resized(scale_factor=2), X, **FEW),
    "bilinear": case(resized(scale_factor=2, mode="bilinear"), X, **FEW),
    "bicubic to a size": case(resized(size=(5, 7), mode="bicubic"), X, **FEW),
    "smaller, antialiased": case(resized(size=(3, 3), mode="bilinear", antialias=True), X, **LARGE),
    "area": case(resized(size=(3, 3), mode="area"), X, **LARGE),
    "pad": case(padded("constant", 1, 1, 2, 1), X, **FEW),
    "pad, reflect": case(padded("reflect", 1, 1, 1, 1), X, **FEW),
    "pad, replicate": case(padded("replicate", 0, 1, 2, 1), X, **FEW),
    "pad, circular": case(padded("circular", 1, 1, 1, 2), X, **FEW),
    "pad, reflect, at the end": case(linear_at_the_end("reflect"), X, (2, 4, 3, 3), **FEW),
    "pad, replicate, at the end": case(linear_at_the_end("replicate"), X, (2, 4, 3, 3), **FEW | {"worlds": (3, 4)}),
    "pixel shuffle": case(lambda x: F.pixel_shuffle(x, 2), X, **FEW),
    "pixel unshuffle": case(lambda x: F.pixel_unshuffle(x, 2), (1, 2, H, 4), **FEW | {"heights": (6, 2)}),
    "grid sample": case(
        lambda x, g: F.grid_sample(x, g.tanh(), "bicubic", "reflection", align_corners=False),
        X, (1, 4, 3, 2), **FEW,
    ),
}  # fmt: skip

NORMS = {
    "group norm": case(lambda x, w, b: F.group_norm(x, 2, w, b), X, (4,), (4,), **FEW),
    "group norm, third derivatives": case(lambda x, w: F.group_norm(x, 2, w), X, (4,), **FEW | {"order": 3}),
    "batch norm": case(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), X, (4,), (4,), **FEW),
    "batch norm, evaluation": case(
        lambda x, w, b: F.batch_norm(x, torch.zeros(4).double(), torch.ones(4).double(), w, b).relu_(),
        X, (4,), (4,), **FEW | {"worlds": (3, 4)},
    ),
    "instance norm": case(lambda x, w: F.instance_norm(x, None, None, w), X, (4,), **FEW),
    "layer norm of columns": case(lambda x, w, b: F.layer_norm(x, (5,), w, b), X, (5,), (5,), **FEW),
    "layer norm of pixels": case(lambda x: F.layer_norm(x, x.shape[-2:]), X, **FEW),
    "rms norm": case(lambda x: F.rms_norm(x, x.shape[-2:], eps=1e-3), X, **FEW),
    "local response norm": case(lambda x: F.local_response_norm(x, 3), X, **FEW),
    "normalize": case(lambda x: F.normalize(x, dim=-2), X, **FEW),
}  # fmt: skip


def attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(tokens, tokens * 2, tokens.sin())


def heads(q: Tensor, k: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, k.sin())


OTHERS = {
    "attention": case(attention, X, **FEW),
    "linear attention": case(lambda x: torch.einsum("bchw,bdhw->bcd", x, x.softmax(1)), X, **FEW),
    "einsum": case(lambda x, w: torch.einsum("bchw,cd->bdhw", x, w), X, (4, 3), **FEW),
    "matmul": case(lambda x, w: x @ w, X, (5, 3), **FEW),
    "mean and variance": case(lambda x: (x - x.mean((-2, -1), True)) / (x.var((-2, -1), keepdim=True) + 1), X, **FEW),
    "norm": case(lambda x: x / (1 + torch.linalg.vector_norm(x)), X, **FEW),
    "logsumexp": case(lambda x: torch.logsumexp(x, -2), X, **FEW),
    "softmax of rows": case(lambda x: x.softmax(-2), X, **FEW),
    "product": case(lambda x: x.prod(-2), X, **FEW),
    "largest": case(lambda x: x.amax((-2, -1), keepdim=True) * x, X, **FEW),
    "cumsum": case(lambda x: x.cumsum(-2), X, **FEW),
    "rows of another order": case(lambda x: torch.cat([x.flip(-2), x.roll(1, -2)], -2) * 2, X, **FEW),
    "gather": case(lambda x: x.gather(-2, torch.zeros(1, 4, 2, 5).long()), X, **FEW),
    "index_select": case(lambda x: x.index_select(-2, torch.tensor([1, 0, 1])), X, fallback="index_select", **FEW),
    "scatter_add": case(lambda x: (x * 1).scatter_add(-1, (x > 0).long(), x.sin()), X, **FEW),
    "largest so far, of columns": case(lambda x: x.cummax(-1)[0], X, **FEW),
    "norm where a rank has zeros": case(
        lambda x: torch.linalg.vector_norm(x * (torch.arange(x.shape[-2]) < 2)[:, None], 3.5), X, **LARGE
    ),
    "merged, in place": case(lambda x: (x * 1).flatten(1, 2).mul_(2).sub_(1), X, **FEW),
    "attention, heads sharded": case(heads, (2, H, 5, 4), (2, H, 6, 4), dim=1, sharded=2, **FEW),
    "fft": case(lambda x: torch.fft.rfft2(x).abs().square(), X, **FEW),
    "embedding": case(lambda x, w: F.embedding((x > 0).long(), w) * x[..., None], X, (2, 3), **FEW),
    "cross entropy": case(lambda x: F.cross_entropy(x, (x[:, 0] > 0).long()), X, **FEW),
    "a transposed image": case(lambda x, w: F.conv2d(x.transpose(-1, -2), w, padding=1), X, (3, 4, 3, 3), **FEW),
}


@pytest.mark.parametrize("case", STENCILS.values(), ids=STENCILS)
def test_stencils(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
def test_norms(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_others(case: Callable[[], None]) -> None:
    case()
