"""Tensors of no elements: batch, channels, rows or columns of size 0 give what they give on one device, or its error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from distpatch import PatchTensor
from distpatch.torch_utils.tree import tensors_in
from tests.support import oracle
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks

# Shapes, the dim that is sharded.
SHAPES = [
    ((0, 4, 6, 5), 2), ((2, 0, 6, 5), 2), ((2, 4, 0, 5), 2), ((2, 4, 6, 0), 2), ((0, 5), 0), ((0, 5), 1), ((5, 0), 0),
    ((5, 0), 1), ((0, 4, 5), 1), ((2, 4, 0), 1), ((2, 0, 4), 2), ((0, 6, 4, 4), 0),
]  # fmt: skip


def of_channels(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], dtype=x.dtype)


def convolved(x: Tensor) -> Tensor:
    weight = random_tensor((4, x.shape[1], *[3] * (x.ndim - 2)))
    return getattr(F, f"conv{x.ndim - 2}d")(x, weight, padding=1)


def attended(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).reshape(x.shape)


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "layer_norm of rows": lambda x: F.layer_norm(x, x.shape[-2:]),
    "layer_norm of samples": lambda x: F.layer_norm(x, x.shape[1:], torch.ones(x.shape[1:], dtype=x.dtype)),
    "layer_norm of channels": lambda x: F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-2:]),
    "group_norm": lambda x: F.group_norm(x, 2, of_channels(x)),
    "instance_norm": F.instance_norm,
    "batch_norm": lambda x: F.batch_norm(x, 0 * of_channels(x), of_channels(x)),
    "batch_norm in training": lambda x: F.batch_norm(x, None, None, of_channels(x), training=True),
    "convolution": convolved,
    "attention": attended,
    "linear": lambda x: F.linear(x, random_tensor((3, x.shape[-1]))),
    "matmul": lambda x: x.transpose(-1, -2) @ x,
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(-2),
    "max": lambda x: x.max(),
    "max of rows": lambda x: x.max(-2),
    "argmax": lambda x: x.argmax(1),
    "aminmax": torch.aminmax,
    "prod": lambda x: x.prod(-2),
    "var": lambda x: x.var(1),
    "logsumexp": lambda x: x.logsumexp(-2),
    "norm": lambda x: torch.linalg.vector_norm(x, float("inf")),
    "median": lambda x: x.median(-2),
    "topk": lambda x: x.topk(1, -2),
    "softmax": lambda x: x.softmax(-2),
    "softmax beyond": lambda x: x.softmax(3),
    "cumsum": lambda x: x.cumsum(-2),
    "flatten": lambda x: x.flatten(1),
    "flatten beyond": lambda x: x.flatten(2),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "index_select": lambda x: x.index_select(-2, torch.tensor([0, 1])),
    "index_select of channels": lambda x: x.index_select(1, torch.tensor([0])),
    "chunks": lambda x: x.chunk(2, -2),
    "cat": lambda x: torch.cat([x, x], -2),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "pad, replicate": lambda x: F.pad(x, (1, 1) * (x.ndim - 2), mode="replicate"),
    "pad, circular": lambda x: F.pad(x, (1, 1) * (x.ndim - 2), mode="circular"),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2).detach(),  # torch's own gradient has another shape
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 2),
    "gelu": lambda x: F.gelu(x) + x,
    "mse_loss": lambda x: F.mse_loss(x, 2 * x),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.zeros((x.shape[0], *x.shape[2:]), dtype=torch.long)),
    "dropout": lambda x: F.dropout(x, 0.5),
    "randn_like": lambda x: torch.randn_like(x) * x,
}


def outcome(operation: Callable[[Tensor], Any], leaf: Tensor, x: Tensor) -> Any:
    """Every tensor of the result and the gradient of the leaf, or the error."""
    try:
        results = [distpatch.gather(t) for t in tensors_in(operation(x))]
        differentiable = [t.sum() for t in results if t.requires_grad]
        if differentiable:
            torch.stack(differentiable).sum().backward()
        return [*(t.detach() for t in results), leaf.grad]
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")  # torch says so on one device
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=map(str, SHAPES))
def test_empty(shape: tuple[int, ...], dim: int, world: int) -> None:
    def body(rank: int) -> list[Any]:
        found = []
        for operation in OPERATIONS.values():
            leaf = random_tensor(shape).requires_grad_()
            x = distpatch.shard(leaf, dist.group.WORLD, dim=dim)
            x.region = replace(x.region, options=replace(x.region.options, fallback="allow"))
            found.append(outcome(operation, leaf, x))
        return found

    ranks = run_ranks(world, body, timeout=30)
    for index, (name, operation) in enumerate(OPERATIONS.items()):
        leaf = random_tensor(shape).requires_grad_()
        wanted = outcome(operation, leaf, leaf)
        for found in (found[index] for found in ranks):
            if isinstance(wanted, Exception):
                known = (type(wanted), distpatch.DistPatchError)
                assert isinstance(found, known) or isinstance(wanted, type(found)), f"{name}: {found!r} for {wanted!r}"
                continue
            assert not isinstance(found, Exception), f"{name}: {found!r}"
            for value, right in zip(found, wanted, strict=True):
                assert not isinstance(value, PatchTensor)
                oracle.assert_same(value, right, oracle.TOLERANCE, name)
        oracle.compared += 1
