"""``self_test``: faults that are planted between two ranks are found, and named by the pair."""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distpatch
from distpatch.comm.choose_transport import using
from distpatch.comm.point_to_point import PointToPoint
from distpatch.comm.self_test import SelfTest, rounds
from distpatch.comm.transport import Batch, Works
from tests.support.threads import rank_outcomes, run_ranks


class Faulty(PointToPoint):
    """The backend corrupts, or loses, message ``nth`` and all later ones of one pair of ranks."""

    def __init__(self, pg: dist.ProcessGroup, ends: tuple[int, int], kind: str, nth: int, counted: Any) -> None:
        super().__init__(pg)
        self.ends, self.kind, self.nth, self.counted = ends, kind, nth, counted

    def post(self, batch: Batch) -> Works:
        outgoing = list(batch.outgoing)
        for index, peer in enumerate(batch.to):
            if (self.pg.rank(), peer) == self.ends and next(self.counted) >= self.nth:
                if self.kind == "lost":  # neither side may wait for the other's end
                    return []
                outgoing[index] = outgoing[index].clone()
                outgoing[index][outgoing[index].numel() // 2] += 1
        return super().post(replace(batch, outgoing=outgoing))


def faulty(sender: int, receiver: int, kind: str, nth: int = 0) -> AbstractContextManager[None]:
    counted = itertools.count()
    return using(lambda pg, device: Faulty(pg, (sender, receiver), kind, nth, counted))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Filters of warnings are shared between threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "point-to-point transfers are broken")
        yield


def check(rank: int) -> SelfTest:
    return distpatch.self_test(dist.group.WORLD)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_rounds_hold_every_pair_once(size: int) -> None:
    schedule = rounds(size)
    pairs = [tuple(sorted(pair)) for pairs in schedule for pair in pairs.items()]
    assert sorted(set(pairs)) == list(itertools.combinations(range(size), 2))
    assert len(pairs) == 2 * len(set(pairs))  # each rank knows its partner
    assert all(pairs[partner] == rank for pairs in schedule for rank, partner in pairs.items())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_sound_group(world_size: int) -> None:
    reports = run_ranks(world_size, check)
    assert all(report == reports[0] for report in reports)
    assert reports[0].ok and not reports[0].by_collectives
    assert sorted(link.ranks for link in reports[0].links) == list(itertools.combinations(range(world_size), 2))
    assert all(link.microseconds > 0 and link.mib_per_second > 0 for link in reports[0].links)
    reports[0].raise_for_faults()


@pytest.mark.parametrize("nth", [0, 2], ids=["first message", "third message"])
def test_one_corrupted_message_is_found(nth: int) -> None:
    with faulty(2, 0, "corrupted", nth):
        reports = run_ranks(3, check)
    assert {(fault.test, fault.sender, fault.receiver) for fault in reports[1].faults} == {("point to point", 2, 0)}
    assert all(report == reports[0] for report in reports)
    assert "came as" in reports[1].faults[0].problem
    with pytest.raises(distpatch.RankError, match="point to point, rank 2 to rank 0"):
        reports[1].raise_for_faults()


def test_a_lost_message_is_found_and_the_other_pairs_are_tested() -> None:
    with faulty(1, 2, "lost"):
        reports = rank_outcomes(3, check, timeout=2)
    assert all(isinstance(report, SelfTest) for report in reports), reports
    assert ("point to point", 1, 2) in {(fault.test, fault.sender, fault.receiver) for fault in reports[0].faults}
    assert {fault.test for fault in reports[0].faults} == {"point to point"}
    assert {(0, 1), (0, 2)} == {link.ranks for link in reports[0].links}
    assert reports[0].by_collectives


def test_a_rank_that_never_comes_is_named() -> None:
    def body(rank: int) -> SelfTest | None:
        return distpatch.self_test(dist.group.WORLD) if rank != 1 else None

    first, _, third = rank_outcomes(3, body, timeout=1)
    for report in (first, third):
        assert {(fault.sender, fault.receiver) for fault in report.faults} == {(1, 0), (1, 2)}
        assert "no answer within 1 s" in str(report.faults[0])


def test_a_rank_that_stops_half_way_is_named() -> None:
    """Its partner waits for a message, and comes late to tell; it is not blamed."""
    released = threading.Event()

    class Stops(PointToPoint):
        def post(self, batch: Batch) -> Works:
            if dist.get_rank() == 2:
                released.wait(30)
                raise RuntimeError("stopped")
            return super().post(batch)

    def body(rank: int) -> SelfTest:
        report = distpatch.self_test(dist.group.WORLD)
        released.set()
        return report

    with using(lambda pg, device: Stops(pg)):
        reports = rank_outcomes(3, body, timeout=1)
    for rank in (0, 1):
        absent = {(f.sender, f.receiver) for f in reports[rank].faults if "no answer" in f.problem}
        assert absent == {(2, 0), (2, 1)}


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_with_broken_transfers_the_rows_move_by_collectives(world_size: int) -> None:
    """A model is exact, forward and backward, where every message from rank 0 to rank 1 arrives wrong."""
    x = torch.randn(1, 3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 3, 3, 2, 1)).double()
    expected_x = x.clone().requires_grad_()
    expected = net(expected_x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), expected_x)

    def body(rank: int) -> tuple[torch.Tensor, torch.Tensor, distpatch.Trace]:
        mine = copy.deepcopy(net)
        given = x.clone().requires_grad_()
        assert check(rank).by_collectives
        distpatch.convert_model(mine, dist.group.WORLD)
        with distpatch.trace() as t:
            result = mine(given)
            (grad,) = torch.autograd.grad(result.square().sum(), given)
        return result.detach(), grad, t

    with faulty(0, 1, "corrupted"), pytest.warns(UserWarning, match="transfers are broken.*rank 0 to rank 1"):
        outcomes = run_ranks(world_size, body)
    for result, grad, t in outcomes:
        torch.testing.assert_close(result, expected.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)
        assert t.count("p2p") == 0 and t.count("all_gather") > 0


def test_no_fallback_where_it_is_not_wanted() -> None:
    with faulty(0, 1, "corrupted"):
        reports = run_ranks(2, lambda rank: distpatch.self_test(dist.group.WORLD, fallback=False))
    assert not reports[0].ok and not reports[0].by_collectives


def test_a_wrong_collective_is_named() -> None:
    """Then nothing can take the place of point to point."""

    class Wrong(Faulty):
        def all_gather(self, tensor: torch.Tensor, op: str) -> torch.Tensor:
            everyone = super().all_gather(tensor, op)
            if dist.get_rank() == 0:
                everyone[1].view(-1)[0] += 1  # of what rank 1 sent
            return everyone

    counted = itertools.count()
    with using(lambda pg, device: Wrong(pg, (0, 1), "corrupted", 0, counted)):
        reports = run_ranks(2, check)
    assert {(f.test, f.sender, f.receiver) for f in reports[1].faults} == {
        ("point to point", 0, 1),
        ("all_gather", 1, 0),
    }
    assert not reports[1].by_collectives
