"""Statistics far from zero: no more error than torch's own result on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks

CHANNELS = 8


def with_running(norm: Callable[..., Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The result, and the running mean and variance, which are those of this batch alone."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        kind = torch.promote_types(x.dtype, torch.float32)
        mean, var = torch.zeros(CHANNELS, dtype=kind), torch.ones(CHANNELS, dtype=kind)
        return norm(x, mean, var, momentum=1.0), mean, var

    return run


STATISTICS: dict[str, Callable[[Tensor], Any]] = {
    "group": lambda x: F.group_norm(x, 2),
    "group, a channel each": lambda x: F.group_norm(x, CHANNELS),
    "batch": with_running(lambda x, *running, **how: F.batch_norm(x, *running, training=True, **how)),
    "instance": with_running(F.instance_norm),
    "layer of a row": lambda x: F.layer_norm(x, x.shape[3:]),
    "layer of an image": lambda x: F.layer_norm(x, x.shape[1:]),
    "var": lambda x: x.var(),
    "var of a channel": lambda x: x.var((0, 2, 3)),
    "std of a row": lambda x: x.std(3),
    "var_mean of a sample": lambda x: torch.var_mean(x, (1, 2, 3))[0],
}


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ratio", [100, 1000])
@pytest.mark.parametrize("name", STATISTICS)
def test_no_more_error_than_one_device(name: str, ratio: int, dtype: torch.dtype) -> None:
    """The largest error against fp64, of the same rounded input, is not above torch's, or is not above half a unit
    in the last place of the largest value: what rounding the true result to its dtype may cost, and what a result
    that is right in every digit can have where torch's was lucky. No other margin."""
    run = STATISTICS[name]
    for seed, shape in enumerate([(2, CHANNELS, 33, 17), (1, CHANNELS, 128, 96)]):
        x = (random_tensor(shape, seed) + ratio).to(dtype)
        true, single = tensors(run(x.double())), tensors(run(x))
        for world in (2, 3, 4):
            ranks = run_ranks(
                world, lambda rank: distpatch.gather(run(distpatch.shard(x, dist.group.WORLD))), keep=True
            )
            for right, one, ours in zip(true, single, tensors(ranks[0])):
                assert ours.dtype == one.dtype
                unit = torch.finfo(one.dtype).eps / 2 * right.abs().max().item()
                error, allowed = ((t.double() - right).abs().max().item() for t in (ours, one))
                assert error <= max(allowed, unit), f"{shape} on {world} ranks: {error:.3g}, one device {allowed:.3g}"


AT_LARGE_MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm": lambda x: F.group_norm(x, 16),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "instance_norm": F.instance_norm,
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-2:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-2:]),
    "var": lambda x: torch.var(x, dim=(2, 3)),
    "std": torch.std,
    "var_mean": lambda x: torch.stack(torch.var_mean(x, dim=(0, 2, 3))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [100, 1000])
def test_no_less_exact_than_torch_at_large_means(mean: int, dtype: torch.dtype) -> None:
    """Values of mean 100 and 1000 and deviation 1: no more error than torch's own on one device."""
    inputs = [
        (mean + random_tensor(shape, dtype=torch.float32)).to(dtype) for shape in ((4, 32, 24, 16), (1, 32, 96, 64))
    ]

    def body(rank: int) -> list[Tensor]:
        outs = []
        for x in inputs:
            for fn in AT_LARGE_MEANS.values():
                for grad in (False, True):
                    leaf = distpatch.shard(x.clone().requires_grad_(grad), dist.group.WORLD, dim=2)
                    outs.append(distpatch.gather(fn(leaf)).detach())
        return outs

    for outs in run_ranks(3, body):
        results = iter(outs)
        for x in inputs:
            for name, fn in AT_LARGE_MEANS.items():
                right = fn(x.double())
                own = (fn(x).double() - right).abs()
                for _ in range(2):
                    error = (next(results).double() - right).abs()
                    assert error.mean() <= 1.1 * own.mean() + 1e-8, (name, x.shape, error.mean(), own.mean())
                    assert error.max() <= 1.5 * own.max() + 1e-8, (name, x.shape, error.max(), own.max())
