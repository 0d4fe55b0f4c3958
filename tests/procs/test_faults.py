"""A rank that fails is known by name, on every rank, within seconds, whatever the group's timeout: here 30 minutes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks.failures.cases import AGENT, FAILURES, FILE, RANK_0, TRANSPORTS, Case, Failure, run
from tests.procs import bodies
from tests.procs.pool import Died, Pool
from tests.support.oracle import assert_same, random_tensor
from tests.support.zoo.models import tiny_kl

LIMIT_S = 15  # of a machine that does much else; python -m benchmarks.failures prints what it takes
GLOO, NCCL = TRANSPORTS
HALF_AN_HOUR = 1800


def failure(part: str) -> Failure:
    (found,) = [failure for failure in FAILURES if part in failure.name]
    return found


CASES = {
    "raises": Case(failure("exception"), GLOO),
    "raises, NCCL": Case(failure("exception"), NCCL),
    "backward": Case(failure("backward"), GLOO),
    "backward, NCCL": Case(failure("backward"), NCCL),
    "memory": Case(failure("memory"), NCCL, victim=2),
    "killed, NCCL": Case(failure("SIGKILL"), NCCL),
    "killed with the store": Case(failure("SIGKILL"), GLOO, RANK_0, victim=0),
    "stopped with the store": Case(failure("SIGSTOP"), NCCL, RANK_0, victim=0),
    "stopped": Case(failure("SIGSTOP"), GLOO),
    "ends, file": Case(failure("ends"), GLOO, FILE),
    "displaced": Case(failure("displaced"), NCCL, AGENT),
    "compiled": Case(failure("compiled"), NCCL),
    "compile=": Case(failure("compile="), GLOO),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_rank_is_told(case: Case) -> None:
    outcome = run(case, LIMIT_S)
    assert not outcome.problem
    assert len(outcome.told) == 2
    for told in outcome.told:
        assert told.seconds is not None, f"rank {told.rank} was told nothing in {LIMIT_S} s {told.text}"
        assert told.names, f"rank {told.rank}: {told.kind} {told.text}"


@pytest.fixture(scope="module")
def three() -> Iterator[Pool]:
    pool = Pool(3)
    yield pool
    pool.close()


def assert_image(image: torch.Tensor) -> None:
    with torch.no_grad():
        assert_same(image, tiny_kl().decode(random_tensor((1, 4, 12, 5))).sample, 1e-11, "image")


@pytest.mark.parametrize(
    ("hosts", "said", "seconds"),
    [("one", "is stopped", 4), ("each", "gives no sign of life", 8)],
    ids=["seen", "heard"],
)
def test_a_process_that_is_stopped_for_a_while(three: Pool, hosts: str, said: str, seconds: float) -> None:
    """The others give up soon after ``liveness=1``, or three times that where they cannot see it; when it goes on it
    is told so, too, and the next call is right."""
    started = time.monotonic()
    answers = three.run(3, bodies.is_stopped, 2, hosts, seconds, timeout=HALF_AN_HOUR)
    for rank, (message, image) in enumerate(answers):
        assert f"rank 2 {said}" in message, f"rank {rank}: {message}"
        assert_image(image)
    assert time.monotonic() - started < 2 * LIMIT_S


@pytest.mark.parametrize("hosts", ["one", "each"])
@pytest.mark.parametrize("way", ["torch", "Python"])
def test_a_rank_that_computes_for_long(three: Pool, way: str, hosts: str) -> None:
    """Alone, between two exchanges, for many times the patience: no alarm."""
    for image in three.run(3, bodies.computes_alone, 1, way, hosts, timeout=HALF_AN_HOUR):
        assert_image(image)


@pytest.mark.parametrize("nccl", [False, True], ids=TRANSPORTS)
def test_a_rank_that_has_done_its_part_may_leave(nccl: bool) -> None:
    """Its process ends while others still wait for each other: no alarm, until they call it again."""
    pool = Pool(3)
    with contextlib.closing(pool):
        (image, said), left, (_, said_on_2) = pool.outcomes(3, bodies.leaves_early, nccl, timeout=HALF_AN_HOUR)
    assert isinstance(left, Died)
    assert_image(image)
    assert "rank 1 has ended" in said and "rank 1 has ended" in said_on_2
