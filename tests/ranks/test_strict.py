"""The same bodies over a transport that is as late and as strict as NCCL may be (tests/support/transports/late.py), and that transport."""

from __future__ import annotations

import math
import random
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from distpatch.comm.communicator import communicator
from distpatch.comm.row_exchange import fetch_rows
from distpatch.comm.transport import Batch
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import rank_outcomes, run_ranks
from tests.support.transports.late import End, Late, late
from tests.support.zoo.models import on_ranks, tiny_kl


@pytest.mark.parametrize("world", [2, 3, 4])
def test_decode_and_backward(world: int) -> None:
    model, x = tiny_kl(), random_tensor((1, 3, 40, 24))

    def run(model: Any, rank: int = 0) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        image = model(leaf).sample
        (image * random_tensor(tuple(image.shape), seed=1)).sum().backward()
        return [image.detach(), leaf.grad, *(p.grad for p in model.parameters())]

    right = run(model)
    model.zero_grad()
    with late():
        results = run_ranks(world, on_ranks(model, run))
    for result in results:
        for value, wanted in zip(result, right, strict=True):
            scale = wanted.abs().max().clamp(min=1)
            assert_same(value / scale, wanted / scale, 1e-11, "value or gradient")


@pytest.mark.parametrize("seed", range(12))
def test_any_intervals_from_any_layout(seed: int) -> None:
    """``fetch_rows`` and its backward, for rows that stand anywhere and are asked for by anyone."""
    draw = random.Random(seed)
    world, rows, count = draw.randint(2, 6), draw.randint(1, 12), draw.randint(1, 3)
    bounds = (0, *sorted(draw.randint(0, rows) for _ in range(world - 1)), rows)
    intervals = [tuple(sorted(draw.choices(range(rows + 1), k=2))) for _ in range(world * count)]
    needs = tuple(tuple(intervals[rank * count : (rank + 1) * count]) for rank in range(world))
    full = random_tensor((2, 3, rows, 4))
    cotangents = [random_tensor((2, 3, hi - lo, 4), seed=index) for index, (lo, hi) in enumerate(intervals)]
    gradient = torch.zeros_like(full)
    for (lo, hi), cotangent in zip(intervals, cotangents, strict=True):
        gradient[:, :, lo:hi] += cotangent

    def body(rank: int) -> None:
        comm = communicator(dist.group.WORLD)
        local = full[:, :, slice(*bounds[rank : rank + 2])].clone().requires_grad_()
        for channels_last in (False, True):
            local.grad = None
            pieces = fetch_rows(local, 2, bounds, needs, comm.name, "test", channels_last)
            for piece, (lo, hi) in zip(pieces, needs[rank], strict=True):
                assert torch.equal(piece, full[:, :, lo:hi])
            own = cotangents[rank * count : (rank + 1) * count]
            sum((p * c).sum() for p, c in zip(pieces, own, strict=True)).backward()
            right = gradient[:, :, slice(*bounds[rank : rank + 2])]
            got = torch.zeros_like(right) if local.grad is None else local.grad
            torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)

    with late():
        run_ranks(world, body)


def test_models_on_many_layouts() -> None:
    """A decoder called with shards of any size, in turn."""
    model = tiny_kl(channels=(8, 16)).decoder
    z = random_tensor((1, 4, 9, 5))
    layouts = [(0, 9, 9, 9), (0, 0, 0, 9), (0, 1, 8, 9), (0, 4, 4, 9), (0, 3, 6, 9)]

    def body(rank: int) -> list[Tensor]:
        with torch.no_grad():
            shards = [distpatch.shard(z, dist.group.WORLD, bounds=bounds) for bounds in layouts]
            return [distpatch.gather(model(shard)) for shard in shards]

    with torch.no_grad():
        right = model(z)
    with late():
        for results in run_ranks(3, body):
            for bounds, result in zip(layouts, results, strict=True):
                assert_same(result, right, 1e-11, f"bounds {bounds}")


def post(rank: int, verbs: str, sizes: tuple[int, ...] = (1, 1)) -> None:
    """Exchange with the other of two ranks, one verb a batch."""
    comm = communicator(dist.group.WORLD)
    for verb, size in zip(verbs, sizes, strict=True):
        to, source = ([1 - rank], []) if verb == "s" else ([], [1 - rank])
        tensors = [torch.zeros(size)]
        batch = Batch("test", to, tensors * len(to), source, tensors * len(source), torch.device("cpu"))
        comm.transport(batch.device).exchange(batch)


def test_crossed_sends_are_a_deadlock() -> None:
    """Both ranks send first: the strict transport names who waits for whom."""
    with late(timeout_s=1):
        run_ranks(2, lambda rank: post(rank, "sr" if rank else "rs"))
        for outcome in rank_outcomes(2, lambda rank: post(rank, "sr")):
            assert isinstance(outcome, distpatch.RankError)
            assert "rank 0's send to rank 1" in str(outcome) and "rank 1's send to rank 0" in str(outcome)


def test_a_message_of_another_size() -> None:
    """gloo ends the process there."""
    with late(timeout_s=1):
        outcomes = rank_outcomes(2, lambda rank: post(rank, "s" if rank else "r", sizes=(1 + rank,)))
    for outcome in outcomes:
        assert isinstance(outcome, distpatch.RankError)
        assert "rank 1's send to rank 0 (8 bytes) met rank 0's receive from rank 1 (4 bytes)" in str(outcome)


def test_a_rank_that_skips_an_exchange() -> None:
    x, weight = random_tensor((1, 2, 6, 4)), random_tensor((2, 2, 3, 3))

    def body(rank: int) -> None:
        sharded = distpatch.shard(x, dist.group.WORLD)
        if rank != 1:
            F.conv2d(sharded, weight, padding=1)

    with late(timeout_s=1):
        outcomes = rank_outcomes(3, body)
    assert [type(outcome) for outcome in outcomes] == [distpatch.RankError, type(None), distpatch.RankError]
    assert "conv2d: rank 0 timed out waiting for rank 1" in str(outcomes[0])


def test_it_is_as_late_as_it_may_be() -> None:
    """Nothing has landed before it was waited for, and what is sent is read no sooner than at a wait."""
    met = threading.Barrier(2)

    def body(rank: int) -> list[float]:
        hub, peer = hubs[0], 1 - rank
        outgoing, landing = torch.full((2,), float(rank)), torch.zeros(2)
        transport = End(hub, dist.group.WORLD)
        works = transport.post(Batch("test", [peer], [outgoing], [peer], [landing], torch.device("cpu")))
        seen = [landing[0].item()]
        outgoing.fill_(rank + 10)  # too early
        met.wait()
        works[0][0].wait()
        seen.append(landing[0].item())
        met.wait()
        works[1][0].wait()
        outgoing.fill_(rank + 20)  # in time
        met.wait()
        return [*seen, landing[0].item()]

    hubs = [Late()]
    for rank, (before, after, later) in enumerate(run_ranks(2, body)):
        assert math.isnan(before) and after == later == 1 - rank + 10


def test_collectives() -> None:
    """Sums, of bools whether any is; what the ranks bring has one shape."""

    def body(rank: int) -> tuple[Any, ...]:
        transport = End(hub, dist.group.WORLD)
        total, flags = torch.tensor([1.0, rank]), torch.tensor([rank == 1, False])
        transport.all_reduce(total, "test")
        transport.all_reduce(flags, "test")
        everyone = transport.all_gather(torch.tensor([[rank]]), "test")
        with pytest.raises(RuntimeError, match=r"rank 0's \(1,\) of torch.float32, rank 1's \(2,\)"):
            transport.all_reduce(torch.zeros(min(rank + 1, 2)), "test")
        return total.tolist(), flags.tolist(), everyone.tolist()

    hub = Late()
    for outcome in run_ranks(3, body):
        assert outcome == ([3.0, 3.0], [True, False], [[[0]], [[1]], [[2]]])
