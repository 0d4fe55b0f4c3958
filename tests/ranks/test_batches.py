"""What a batch of messages carries, and what becomes of the others when one of them fails."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

import distpatch
from distpatch.comm import point_to_point
from distpatch.comm.choose_transport import between, using
from distpatch.comm.collectives import stack_ranks, sum_partials
from distpatch.comm.communicator import communicator
from distpatch.comm.row_exchange import fetch_rows
from distpatch.comm.transport import Batch, Layer, Transport, Works
from distpatch.layout.rows import even_bounds
from tests.support.fake_groups import NCCL, Group, gpu
from tests.support.oracle import H, assert_same, check, random_tensor
from tests.support.threads import run_ranks
from tests.support.transports.staged import maybe, staged
from tests.support.zoo.models import on_ranks, tiny_kl

DTYPES = [torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128]
DTYPES += [torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bfloat16, torch.float64]


def numbers(rank: int, dtype: torch.dtype) -> Tensor:
    """(2, 5) small numbers, of which sums are exact in every dtype."""
    values = (torch.arange(10).view(2, 5) + rank) % 3
    return (values + 1j * rank).to(dtype) if dtype.is_complex else values.to(dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, world: int) -> None:
    """Rows from all ranks, sums and stacks: every dtype, also those that NCCL or gloo lack."""
    everyone = [numbers(rank, dtype) for rank in range(world)]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    added = torch.stack([t.to(wide) for t in everyone]).sum(0).to(dtype)
    bounds, needs = even_bounds(2 * world, world), (((0, 2 * world),),) * world

    def body(rank: int) -> list[Tensor]:
        name = communicator(dist.group.WORLD).name
        (rows,) = fetch_rows(everyone[rank], 0, bounds, needs, name, "test", False)
        return [rows, sum_partials(everyone[rank], name, "test"), stack_ranks(everyone[rank], name, "test")]

    for result in run_ranks(world, body, keep=True):
        for value, right in zip(result, [torch.cat(everyone), added, torch.stack(everyone)], strict=True):
            assert value.dtype == dtype
            assert torch.equal(value.to(wide), right.to(wide))


@pytest.mark.parametrize("world", [2, 3])
def test_staged_transfers(world: int) -> None:
    """As a GPU's over gloo: a model with convolutions, norms and attention, forward and backward."""
    model, x = tiny_kl(channels=(8, 8)), random_tensor((1, 3, 14, 8))

    def run(model: Any, rank: int = 0) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        image = model(leaf).sample
        (image * random_tensor(tuple(image.shape), seed=1)).sum().backward()
        return [image.detach(), leaf.grad, *(p.grad for p in model.parameters())]

    right = run(copy.deepcopy(model))
    with using(staged):
        for result in run_ranks(world, on_ranks(model, run)):
            for value, wanted in zip(result, right, strict=True):
                scale = wanted.abs().max().clamp(min=1)
                assert_same(value / scale, wanted / scale, 1e-11, "value or gradient")


class Counted(Layer):
    """``posted``: the sizes of the groups in which there were messages."""

    def __init__(self, inner: Transport, posted: set[int], size: int) -> None:
        super().__init__(inner)
        self.posted, self.size = posted, size

    def post(self, batch: Batch) -> Works:
        self.posted.add(self.size)
        return self.inner.post(batch)


def test_a_rule_over_a_transport_put_in_place() -> None:
    """On every number of ranks, also where the oracle has a transport of its own."""
    posted: set[int] = set()
    with using(maybe(lambda pg, device: Counted(between(pg, device), posted, pg.size()))):
        check(lambda x, w: F.conv2d(x, w, padding=1), (2, 3, H, 5), (4, 3, 3, 3), p2p=1)
    assert posted == {2, 3, 4}


@contextmanager
def planted(rank: int, error: Exception) -> Iterator[list[int]]:
    """A batch is left by an exception on one rank, the first time."""
    left, send = [1], point_to_point.send_batch

    def batch(pg: Any, batch: Batch, collects: bool) -> Any:
        if dist.get_rank() != rank or not left:
            return send(pg, batch, collects)
        left.pop()
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(point_to_point, "send_batch", batch)
        yield left


@pytest.mark.parametrize("error", [TypeError("no such dtype"), RuntimeError("no memory")], ids=repr)
@pytest.mark.parametrize("world", [2, 3])
def test_an_exception_inside_a_batch(world: int, error: Exception) -> None:
    """It is told on every rank; the next call begins anew, and no collective is swallowed."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)).double()
    x = random_tensor((1, 2, 7, 4))
    together = threading.Barrier(world)

    def body(rank: int) -> tuple[str, Tensor]:
        model = distpatch.convert_model(copy.deepcopy(net), dist.group.WORLD, lazy=False)
        with pytest.raises(distpatch.RankError) as caught, torch.no_grad():
            model(x)
        together.wait(30)
        assert not c10d._world.pg_coalesce_state
        with torch.no_grad():
            return str(caught.value), model(x)

    with planted(1, error), torch.no_grad():
        for message, result in run_ranks(world, body, timeout=1.5):
            assert str(error) in message and "rank 1" in message
            assert_same(result, net(x), 1e-12, "the call after it")


def test_an_exception_inside_a_batch_without_a_model() -> None:
    """The group's next transfer is refused by name, and does not return what it was given."""
    x, weight = random_tensor((1, 2, 6, 4)), random_tensor((2, 2, 3, 3))

    def body(rank: int) -> None:
        sharded = distpatch.shard(x, dist.group.WORLD)
        with pytest.raises(distpatch.RankError, match="no such dtype|waiting for rank 1"):
            F.conv2d(sharded, weight, padding=1)
        with pytest.raises(distpatch.RankError, match="transfers of this group have failed"):
            sharded.sum()
        again = distpatch.shard(x, dist.group.WORLD)  # every rank begins anew
        assert_same(distpatch.gather(F.conv2d(again, weight, padding=1)), F.conv2d(x, weight, padding=1), 1e-12, "rows")

    with planted(1, TypeError("no such dtype")):
        run_ranks(2, body, timeout=1.5)


def test_a_batch_is_ended_before_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a backend that collects a batch's messages: the thread's next calls must not be collected too."""
    done: list[str] = []

    class Collects(Group):
        def _get_backend(self, device: torch.device) -> Any:
            return SimpleNamespace(supports_coalescing=True, abort=lambda: done.append("abort"))

        def _end_coalescing(self, device: torch.device) -> None:
            done.append(f"end on {device}")
            raise RuntimeError("nothing to end")

    group: Any = Collects(**NCCL)
    point_to_point._end_batch(group, gpu(1))
    assert done == ["end on cuda:1", "abort"]


@pytest.mark.parametrize("grad", [False, True])
def test_numbers_that_memory_does_not_have(grad: bool) -> None:
    """torch conjugates and negates lazily: what is sent is the value."""
    z = torch.arange(16.0, dtype=torch.float64).view(1, 2, 4, 2) * (1 + 2j)

    def body(rank: int) -> None:
        name, own = communicator(dist.group.WORLD).name, z[:, :, 2 * rank : 2 * rank + 2]
        needs = (((0, 4),), ((0, 4),))
        with torch.set_grad_enabled(grad):
            for lazy, whole in ((own.conj(), z.conj()), (own.conj().imag, -z.imag)):
                assert lazy.is_conj() or lazy.is_neg()
                assert_same(fetch_rows(lazy, 2, (0, 2, 4), needs, name, "test", False)[0], whole, 0.0, "rows")
                assert_same(
                    stack_ranks(lazy, name, "test")[1 - rank],
                    whole.roll(2, 2)[:, :, 2 * rank : 2 * rank + 2],
                    0.0,
                    "stack",
                )
                total = whole[:, :, :2] + whole[:, :, 2:]
                assert_same(sum_partials(lazy, name, "test"), total, 0.0, "sum")

    run_ranks(2, body)


@pytest.mark.parametrize(("to", "source", "named"), [([1], [1], 1), ([2], [], 2), ([1, 2], [1], None)])
def test_what_a_collected_batch_waits_for(to: list[int], source: list[int], named: int | None) -> None:
    """On a backend that collects messages: one wait, which names the rank where there is but one."""
    done: list[str] = []

    class Collects(Group):
        def _start_coalescing(self, device: torch.device) -> None:
            done.append("begin")

        def _end_coalescing(self, device: torch.device) -> str:
            done.append("end")
            return "work"

        def recv(self, tensors: list[Tensor], peer: int, tag: int) -> None:
            done.append(f"from {peer}")

        def send(self, tensors: list[Tensor], peer: int, tag: int) -> None:
            done.append(f"to {peer}")

    group: Any = Collects(**NCCL)
    batch = Batch("test", to, [torch.zeros(1)] * len(to), source, [torch.zeros(1)] * len(source), gpu(0))
    assert point_to_point.send_batch(group, batch, True) == [("work", named)]
    assert done == ["begin", *(f"from {peer}" for peer in source), *(f"to {peer}" for peer in to), "end"]


def test_a_single_message_is_a_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL makes another communicator for a message that is sent alone."""
    sizes: list[int] = []
    send = point_to_point.send_batch

    def counted(pg: Any, batch: Batch, collects: bool) -> Any:
        sizes.append(len(batch.to) + len(batch.source))
        return send(pg, batch, collects)

    monkeypatch.setattr(point_to_point, "send_batch", counted)
    bounds, needs = (0, 2, 4), (((0, 0),), ((1, 4),))

    def body(rank: int) -> Tensor:
        name = communicator(dist.group.WORLD).name
        rows = torch.arange(2.0).view(2, 1) + 2 * rank
        return fetch_rows(rows, 0, bounds, needs, name, "test", False)[0]

    assert run_ranks(2, body)[1].flatten().tolist() == [1, 2, 3]
    assert sizes == [1, 1]
