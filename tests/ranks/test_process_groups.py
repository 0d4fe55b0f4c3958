"""The process groups that distpatch makes: by their members alone, and none of the user's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

import distpatch
from distpatch.comm import devices, process_groups
from distpatch.comm.collectives import sum_partials
from distpatch.comm.communicator import Communicator, communicator, group_of
from distpatch.diffusion.displaced_steps import background_of
from tests.support.fake_groups import CPU, gpu
from tests.support.threads import run_ranks


@contextmanager
def splitting(world: int) -> Iterator[list[int]]:
    """torch would split new groups off the default one, as NCCL does: with all ranks of it, or never."""
    everyone, splits = threading.Barrier(world), []

    def split(pg: Any) -> None:
        splits.append(dist.get_rank())
        everyone.wait(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c10d, "_get_split_source", split)
        patch.setattr(devices, "choose", lambda group, given: CPU)
        yield splits


def test_the_user_makes_groups_as_before() -> None:
    """Whatever groups some of the ranks have made for distpatch: the names of the user's own must agree."""

    def body(rank: int) -> int:
        if rank < 2:
            communicator(group_of([0, 1]))
        everyone = dist.new_group([0, 1, 2])
        total = torch.ones(1)
        dist.all_reduce(total, group=everyone)
        return int(total)

    assert run_ranks(3, body, timeout=3) == [3] * 3


def bound(body: Callable[[int], Any]) -> Callable[[int], Any]:
    """With the default group bound to a device, after the user's own groups were made by all ranks."""

    def run(rank: int) -> Any:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3]), dist.new_group([1, 2, 3])]
        world: Any = dist.group.WORLD
        world.bound_device_id = gpu(rank)
        result = body(rank, groups)  # type: ignore[call-arg]
        assert world.bound_device_id == gpu(rank)
        return result

    return run


def sum_over(comm: Communicator) -> int:
    return int(sum_partials(torch.tensor(dist.get_rank()), comm.name, "test"))


def some_ranks(rank: int, groups: Any) -> None:
    if rank < 2:
        assert sum_over(communicator(groups[0])) == 1


def unequal_numbers_of_groups(rank: int, groups: Any) -> None:
    """Rank 2 knows two groups more than rank 3."""
    if rank == 2:
        assert group_of([2]) is not group_of([2])
    if rank >= 2:
        assert sum_over(communicator(groups[1])) == 5


def after_a_failure(rank: int, groups: Any) -> None:
    if rank < 2:
        comm = communicator(groups[0])
        before = comm.name
        comm.abort_call("gave up")
        comm.begin_call("test", "")
        assert comm.name != before and sum_over(comm) == 1


def one_half_of_a_guidance_mesh(rank: int, groups: Any) -> None:
    mesh = distpatch.guidance_mesh()
    halves = communicator(mesh["guidance"])
    assert sum_over(halves) == 2 * (rank - rank % 2) + 1
    if rank % 2:
        assert sum_over(communicator(mesh["rows"])) == 4


def a_guidance_mesh_of_some_ranks(rank: int, groups: Any) -> None:
    if rank < 2:
        mesh = distpatch.guidance_mesh(groups[0])
        assert mesh.mesh.tolist() == [[0], [1]] and sum_over(communicator(mesh["guidance"])) == 1


def the_group_of_a_pipeline(rank: int, groups: Any) -> None:
    if rank != 1:
        assert sum_over(communicator(group_of([0, 3, 2]))) == 5


def the_background_group(rank: int, groups: Any) -> None:
    if rank:
        assert sum_over(background_of(communicator(groups[2]))) == 6


MADE_BY_MEMBERS = [some_ranks, unequal_numbers_of_groups, after_a_failure, one_half_of_a_guidance_mesh]
MADE_BY_MEMBERS += [a_guidance_mesh_of_some_ranks, the_group_of_a_pipeline, the_background_group]


@pytest.mark.parametrize("body", MADE_BY_MEMBERS, ids=lambda body: body.__name__)
def test_groups_are_made_by_their_members_alone(body: Any) -> None:
    with splitting(4) as splits:
        run_ranks(4, bound(body))
    assert splits == []


def test_torchcomms_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c10d, "_use_torchcomms_enabled", lambda: True)
    with pytest.raises(distpatch.RankError, match="TORCH_DISTRIBUTED_USE_TORCHCOMMS"):
        process_groups.by_members([0], "name", timeout=timedelta(1))
