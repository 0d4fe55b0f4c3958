"""Rules that choose as on a GPU, on a CPU: statistics in one reading, or in several; halos in one copy with the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from distpatch.comm.merging import merge_deviations, merge_moments
from distpatch.torch_utils import chunk_sizes
from tests.ranks import test_convolution, test_normalization
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks

NORMS = {
    name: case
    for name, case in test_normalization.CASES.items()
    if name in test_normalization.READ_ONCE or name.startswith(("group_norm", "batch_norm", "instance_norm"))
}
OF_A_PART = {"whole": 128 << 20, "in parts": 1000}  # bytes of one reading


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def choose(statistics_bytes: int) -> None:
        sizes = replace(chunk_sizes.ELSEWHERE, statistics_bytes=statistics_bytes)
        monkeypatch.setitem(chunk_sizes.BY_KIND, "cuda", sizes)
        monkeypatch.setattr(chunk_sizes._Planned, "kind", "cuda")  # of every thread that does not say otherwise

    return choose


@pytest.mark.parametrize("part", OF_A_PART)
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, part: str, as_on_a_gpu: Callable[[int], None]) -> None:
    as_on_a_gpu(OF_A_PART[part])
    NORMS[name]()


@pytest.mark.filterwarnings("ignore:.*padding='same' with even kernel")
@pytest.mark.parametrize("name", test_convolution.CASES)
def test_convolutions(name: str, as_on_a_gpu: Callable[[int], None]) -> None:
    as_on_a_gpu(OF_A_PART["whole"])
    test_convolution.CASES[name]()


@pytest.mark.parametrize("deferred", [False, True], ids=["now", "deferred"])
@pytest.mark.parametrize("part", OF_A_PART)
@pytest.mark.parametrize("mean", [100, 1000])
@pytest.mark.parametrize("shape", [(1, 32, 96, 64), (3, 32, 25, 16)], ids=str)
def test_exact_where_the_mean_is_large(
    shape: tuple[int, ...], mean: int, part: str, deferred: bool, as_on_a_gpu: Callable[[int], None]
) -> None:
    """Not much more error than of torch's own kernel, which on a GPU is the same formula."""
    as_on_a_gpu(OF_A_PART[part])
    x = mean + random_tensor(shape, dtype=torch.float32)
    weight, bias = (random_tensor((32,), seed, dtype=torch.float32) for seed in (1, 2))
    right = F.group_norm(x.double(), 8, weight.double(), bias.double())
    own_error = (F.group_norm(x, 8, weight, bias) - right).abs()

    def body(rank: int) -> Tensor:
        with torch.set_grad_enabled(not deferred):
            return distpatch.gather(F.group_norm(distpatch.shard(x, dist.group.WORLD), 8, weight, bias))

    for result in run_ranks(3, body):
        error = (result - right).abs()
        assert error.max() <= 1.5 * own_error.max() and error.mean() <= 1.5 * own_error.mean()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("counts", [(7,), (4, 4), (5, 4, 4, 0), (1, 1000, 3)], ids=str)
def test_deviations_merge_as_moments(counts: tuple[int, ...], deterministic: bool) -> None:
    """Also a million deviations from 0, and where parts differ by many deviations."""
    mean = 1e6 + 100 * random_tensor((len(counts), 2, 3))
    deviation = random_tensor((len(counts), 2, 3), seed=1).abs()
    torch.use_deterministic_algorithms(deterministic)
    try:
        got_mean, spread = merge_deviations(counts, torch.stack([mean, deviation], 1), 0.25)
    finally:
        torch.use_deterministic_algorithms(False)
    sizes = torch.tensor(counts, dtype=torch.float64).view(-1, 1, 1)
    total, right, m2 = merge_moments(counts, mean, deviation.square() * sizes)
    torch.testing.assert_close(got_mean, right, rtol=1e-14, atol=0)
    torch.testing.assert_close(spread, (m2 / total + 0.25).sqrt(), rtol=1e-9, atol=0)
