"""Autocast: the dtypes of one device, and messages in the dtype of the computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from tests.support.oracle import check, random_tensor
from tests.support.threads import run_ranks

WEIGHT = (3, 3, 3, 3)


def autocast_block(dtype: torch.dtype) -> Callable[..., Any]:
    def run(x: Tensor, w: Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            y = F.conv2d(x, w, padding=1)
            joined = torch.cat([y, y.float()], 2)
            products = F.conv_transpose2d(y, w), y @ y.transpose(2, 3)  # too large for one tolerance
            kinds = [torch.zeros(1, dtype=t.dtype) for t in products]
            return y, F.linear(x.transpose(1, 3), w[:, :, 0, 0]), x.sum((2, 3)), F.softmax(y, 1), joined, *kinds

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_of_one_device(dtype: torch.dtype) -> None:
    floats = [
        lambda n: random_tensor((2, 3, n, 5), dtype=torch.float32),
        lambda _: random_tensor(WEIGHT, 1, torch.float32),
    ]
    check(autocast_block(dtype), *floats, tolerance=0.1)


def test_autocast_sends_the_compute_dtype() -> None:
    def body(rank: int) -> int:
        x = distpatch.shard(random_tensor((1, 4, 8, 6), dtype=torch.float32), dist.group.WORLD)
        w = random_tensor((4, 4, 3, 3), dtype=torch.float32)
        with distpatch.trace() as t, torch.autocast("cpu", torch.bfloat16):
            F.conv2d(x, w, padding=1)
        return t.sent_bytes

    assert run_ranks(2, body) == [4 * 6 * 2] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_under_autocast(dtype: torch.dtype) -> None:
    """A result has the dtype that it has on one device."""
    x, w = random_tensor((2, 8, 6, 4), dtype=torch.float32).to(dtype), torch.ones(8)
    fns: dict[str, Callable[[Any], Any]] = {
        "group_norm": lambda x: F.group_norm(x, 4, w, w),
        "batch_norm": lambda x: F.batch_norm(x, None, None, w, w, training=True),
        "instance_norm": lambda x: F.instance_norm(x, weight=w),
        "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
        "rms_norm": lambda x: F.rms_norm(x, x.shape[1:]),
        "softmax": lambda x: x.softmax(2),
        "log_softmax": lambda x: F.log_softmax(x, dim=-1),
        "sum": torch.sum,
        "mean": lambda x: x.mean((2, 3)),
        "prod": lambda x: x.prod(2),
        "norm": torch.linalg.vector_norm,
        "logsumexp": lambda x: x.logsumexp((2, 3)),
        "var": torch.var,
        "cumsum": lambda x: x.cumsum(2),
        "cumprod": lambda x: x.cumprod(2),
        "matmul": lambda x: x.mT @ x,
        "linear": lambda x: F.linear(x, torch.ones(5, 4)),
        "einsum": lambda x: torch.einsum("bchw,bchv->bcwv", x, x),
        "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
        "attention of plain queries": lambda x: F.scaled_dot_product_attention(distpatch.gather(x), x, x),
        "normalize": lambda x: F.normalize(x, dim=2),
        "amax": lambda x: x.amax(2),
        "cosine_similarity": lambda x: F.cosine_similarity(x, x, dim=2),
        "baddbmm": lambda x: torch.baddbmm(torch.ones(8, 6, 6), x[0], x[0].mT),
        "bilinear": lambda x: F.bilinear(x.float(), x.float(), torch.ones(5, 4, 4)),
        "vecdot": lambda x: torch.linalg.vecdot(x, x, dim=2),
        "linear over the rows": lambda x: F.linear(x.mT, torch.ones(5, 6), torch.ones(5)),
        "einsum over the rows": lambda x: torch.einsum("nc,n->c", x[0, 0], x[0, 0, :, 0]),
        "linalg.norm": lambda x: torch.linalg.norm(x, 1, (2, 3)),
        "vector_norm in fp64": lambda x: torch.linalg.vector_norm(x, dtype=torch.float64),
    }
    with torch.autocast("cpu", torch.bfloat16):
        right = {name: fn(x) for name, fn in fns.items()}

    def body(rank: int) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            rows = distpatch.shard(x, dist.group.WORLD, bounds=(0, 1, 6))
            return {name: distpatch.gather(fn(rows)) for name, fn in fns.items()}

    for name, value in run_ranks(2, body)[1].items():
        assert value.dtype == right[name].dtype, name
        torch.testing.assert_close(value, right[name], rtol=0.03, atol=0.05, msg=lambda m, n=name: f"{n}: {m}")
