"""Tokens joined with others, cut and reshaped by random chains, over meshes: some ranks without rows, or columns."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import distpatch
from tests.support import oracle
from tests.support.mesh_cases import everything
from tests.support.oracle import compare_parts, mesh_of, parts_sent, random_tensor
from tests.support.threads import run_ranks
from tests.support.transports.late import late

MESHES = ((2, 2), (1, 3), (2, 3), (3, 2))
pytestmark = pytest.mark.filterwarnings("ignore:distpatch has no sharded rule")


def joined(t: Tensor, text: Tensor, draw: random.Random) -> Tensor:
    return torch.cat([text, t], 1) if draw.random() < 0.5 else torch.cat([t, text * 2, t.sin()], 1)


def cut(t: Tensor, text: Tensor, draw: random.Random) -> Tensor:
    first = draw.randrange(t.shape[1])
    return t[:, first : draw.randrange(first, t.shape[1]) + 1]


def projected(t: Tensor, text: Tensor, draw: random.Random) -> Tensor:
    return F.linear(t, 1 + torch.eye(t.shape[2], dtype=t.dtype))


def of_heads(t: Tensor, text: Tensor, draw: random.Random) -> Tensor:
    """Merged with the batch, and apart again."""
    batch, count, channels = t.shape
    heads = t.reshape(batch, count, 2, channels // 2).transpose(1, 2).flatten(0, 1) * 2
    return heads.reshape(batch, 2, count, channels // 2).transpose(1, 2).flatten(2)


def half(t: Tensor, text: Tensor, draw: random.Random) -> Tensor:
    parts = t.split([t.shape[1] // 2, t.shape[1] - t.shape[1] // 2], 1)
    return parts[1] + parts[1].mean(1, keepdim=True) + parts[0].sum()


STEPS: tuple[Callable[..., Tensor], ...] = (joined, joined, cut, cut, projected, of_heads, half)


def chain(seed: int, x: Tensor, text: Tensor) -> Tensor:
    draw = random.Random(seed)
    if merged := draw.random() < 0.5:  # all samples are one's tokens
        text = text[:1]
    t = x.permute(0, 2, 3, 1).flatten(0, 2)[None] if merged else x.flatten(2).transpose(1, 2)
    for step in draw.choices(STEPS, k=4):
        t = step(t, text, draw)
    return F.scaled_dot_product_attention(t, t, t)


@pytest.mark.parametrize("first", range(0, 1000, 20) if everything.on else (180, 280, 300))
def test_chains_of_tokens(first: int) -> None:
    for seed in range(first, first + 20):
        draw = random.Random(-seed)
        mesh, shape = draw.choice(MESHES), (draw.randrange(1, 3), 4, draw.randrange(1, 5), draw.randrange(1, 5))
        bounds = [
            (0, *sorted(draw.randrange(size + 1) for _ in range(ranks - 1)), size)
            for ranks, size in zip(mesh, shape[2:])
        ]
        x, text = random_tensor(shape, seed=seed), random_tensor((shape[0], 3, 4), seed=1)
        leaf = x.clone().requires_grad_()
        expected = chain(seed, leaf, text)
        (grad,) = torch.autograd.grad(expected.square().sum(), leaf)

        def body(rank: int, mesh: tuple[int, ...] = mesh, seed: int = seed) -> tuple[Tensor, Tensor, list[int]]:
            group, own = mesh_of(mesh), x.clone().requires_grad_()
            parts_sent(group)
            result = distpatch.gather(chain(seed, distpatch.shard(own, group, dim=(-2, -1), bounds=bounds), text))
            (mine,) = torch.autograd.grad(result.square().sum(), own)
            return result.detach(), mine, parts_sent(group)

        with late():
            results = run_ranks(math.prod(mesh), body, keep=True)
        for result, mine, _ in results:
            torch.testing.assert_close(result, expected.detach(), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(mine, grad, rtol=1e-10, atol=1e-10)
        compare_parts([parts for _, _, parts in results], mesh, f"chain {seed}")
        oracle.compared += 1
