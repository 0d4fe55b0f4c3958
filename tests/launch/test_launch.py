"""What the examples share around torchrun: the group, and work for rank 0 alone."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from distpatch import launch
from distpatch.torch_utils.cores import own_cores
from tests.support.threads import rank_outcomes, run_ranks


def test_without_torchrun_it_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launch.process_group(device="cpu") as (group, device):
        assert (group.size(), group.rank(), device.type) == (1, 0, "cpu")
        assert not launch.console(group).quiet
    assert not dist.is_initialized()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system binds no threads")
@pytest.mark.parametrize(
    ("rank", "ranks", "threads", "cores", "share"),
    [
        pytest.param(1, 2, 1, range(2), {1}, id="one each"),
        pytest.param(0, 2, 1, range(8), {0, 1, 2, 3}, id="more than threads"),
        pytest.param(2, 3, 2, range(8), {5, 6, 7}, id="uneven"),
        pytest.param(1, 2, 3, range(4), None, id="fewer than threads"),
        pytest.param(0, 1, 1, range(4), None, id="one rank"),
        pytest.param(1, 2, 1, [4, 5], None, id="chosen by others"),
    ],
)
def test_a_rank_stays_on_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int, threads: int, cores: list[int], share: set[int] | None
) -> None:
    allowed = [set(cores)]
    monkeypatch.setattr(os, "cpu_count", lambda: max(cores) + 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(allowed[-1]))
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, given: allowed.append(set(given)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for bind in (True, False):
        with launch.process_group(device="cpu", bind=bind):
            assert allowed[-1] == (share if bind and share else set(cores))
        assert allowed[-1] == set(cores)
    with own_cores(torch.device("cuda", 0), rank, ranks, threads):
        assert allowed[-1] == set(cores)


def test_on_rank_0_only() -> None:
    called: list[int] = []

    def body(rank: int) -> list[object]:
        return [launch.on_rank0(dist.group.WORLD, lambda: called.append(rank) or f"call {i}") for i in range(2)]

    assert run_ranks(3, body) == [["call 0", "call 1"], [None, None], [None, None]]
    assert called == [0, 0]


def test_rank_0_loads_first() -> None:
    order: list[int] = []

    def body(rank: int) -> torch.Tensor:
        return launch.rank0_first(dist.group.WORLD, lambda: order.append(rank) or torch.ones(2))

    assert all(torch.equal(result, torch.ones(2)) for result in run_ranks(3, body))
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_all_ranks_end_where_rank_0_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> None:
        raise ValueError("no such photograph")

    outcomes = rank_outcomes(3, lambda rank: launch.rank0_first(dist.group.WORLD, load))
    assert [type(outcome) for outcome in outcomes] == [SystemExit] * 3
    assert capsys.readouterr().err.count("ValueError: no such photograph") == 1


def test_only_rank_0_prints(capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, lambda rank: launch.console(dist.group.WORLD).print(f"from rank {rank}"))
    assert capsys.readouterr().out.split("\n") == ["from rank 0", ""]
