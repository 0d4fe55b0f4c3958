"""The same promises between processes: gloo on the CPU, NCCL where there are two GPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from tests.procs import bodies
from tests.procs.pool import Died, Pool
from tests.support.oracle import assert_same, random_tensor
from tests.support.zoo.models import tiny_kl

gpu = pytest.mark.gpu
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


@pytest.fixture
def mortal() -> Iterator[Pool]:
    """Three processes of which a test may kill one."""
    pool = Pool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def nccl() -> Iterator[Pool]:
    pool = Pool(min(torch.cuda.device_count(), 4), "nccl")
    yield pool
    pool.close()


def assert_right(results: list[dict[str, torch.Tensor]], tolerance: float) -> None:
    right = bodies.round_trip(0, sharded=False)
    for rank, result in enumerate(results):
        assert result.keys() == right.keys()
        for name, wanted in right.items():
            scale = wanted.abs().max().clamp(min=1)
            assert_same(result[name] / scale, wanted / scale, tolerance, f"{name} on rank {rank}")
            assert torch.equal(result[name], results[0][name])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_round_trip(pool: Pool, world: int) -> None:
    assert_right(pool.run(world, bodies.round_trip, timeout=60), 1e-11)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux's scheduler")
def test_threads_of_sockets(pool: Pool) -> None:
    """gloo's threads of distpatch's groups take no core from one that computes; a program's own are left alone."""
    for others, own in pool.run(2, bodies.threads_of_sockets):
        assert others and set(others) == {os.SCHED_OTHER}
        assert own and set(own) == {os.SCHED_BATCH}


@pytest.mark.parametrize("members", [[1, 3], [2], [0, 1, 2]], ids=str)
def test_subgroup(pool: Pool, members: list[int]) -> None:
    results = pool.run(4, bodies.subgroup, members)
    with torch.no_grad():
        right = tiny_kl().decode(random_tensor((1, 4, 7, 5))).sample
    for rank, result in enumerate(results):
        assert (result is not None) == (rank in members)
        if result is not None:
            assert_same(result, right, 1e-11, f"image on rank {rank}")


def test_different_shapes(pool: Pool) -> None:
    """gloo would end the processes; they are all told, and go on."""
    with torch.no_grad():
        right = tiny_kl().decode(random_tensor((1, 4, 7, 5))).sample
    for message, image in pool.run(3, bodies.mismatch):
        assert "called differently" in message and "rank 1: AutoencoderKL.decode ((1, 4, 8, 5)" in message
        assert_same(image, right, 1e-11, "image after the error")


@pytest.mark.parametrize(("victim", "block"), [(2, "conv_in"), (0, "mid_block.attentions.0"), (1, "conv_out")])
def test_a_rank_dies_inside(mortal: Pool, victim: int, block: str) -> None:
    """The survivors are told soon that a rank is gone, and which, whatever the group's timeout is."""
    started = time.monotonic()
    outcomes = mortal.outcomes(3, bodies.dies, victim, block, timeout=1800)
    assert isinstance(outcomes.pop(victim), Died)
    for message in outcomes:
        assert f"rank {victim} has ended" in message, message
    assert time.monotonic() - started < 30


def test_a_rank_dies_between_calls(mortal: Pool) -> None:
    outcomes = mortal.outcomes(3, bodies.dies_between_calls, 1, timeout=1800)
    assert isinstance(outcomes.pop(1), Died)
    for message in outcomes:
        assert "rank(s) [1] of 3 did not call it: rank 1 has ended" in message


def test_the_pool_itself(pool: Pool) -> None:
    """Errors come back by rank, and the processes live on."""
    outcomes = pool.outcomes(2, bodies.raises)
    assert [str(outcome) for outcome in outcomes] == ["rank 0", "rank 1"]
    with pytest.raises(ValueError, match="rank 0"):
        pool.run(2, bodies.raises)


@gpu
@needs_gpus
def test_round_trip_over_nccl(nccl: Pool) -> None:
    assert_right(nccl.run(len(nccl.processes), bodies.round_trip, "cuda", timeout=120), 1e-10)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no CUDA device")
def test_round_trip_on_one_gpu_over_gloo(pool: Pool) -> None:
    """gloo takes no tensors of a GPU: they go through the CPU's memory, and the ranks may share the GPU."""
    assert_right(pool.run(2, bodies.round_trip, "cuda", timeout=120), 1e-10)


@gpu
@needs_gpus
def test_two_ranks_on_one_gpu_over_nccl(nccl: Pool) -> None:
    """They are told before NCCL sees it, and their own GPUs work after that."""
    for message in nccl.run(2, bodies.one_gpu_for_all):
        assert "ranks 0 and 1 use one GPU, cuda:0" in message and "torch.cuda.set_device" in message
    assert_right(nccl.run(2, bodies.round_trip, "cuda", timeout=120), 1e-10)


@gpu
@needs_gpus
def test_different_shapes_over_nccl(nccl: Pool) -> None:
    for message, _ in nccl.run(2, bodies.mismatch, "cuda"):
        assert "called differently" in message
