"""How a group is set up: its device, its own process groups, what its transfers take, and what becomes of them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

import distpatch
from distpatch.comm import devices, process_groups
from distpatch.comm.collectives import stack_ranks, sum_partials
from distpatch.comm.communicator import Communicator, communicator, group_of
from distpatch.comm.row_exchange import fetch_rows
from distpatch.comm.transport import PointToPoint, Staged, between, using
from distpatch.diffusion.displaced_steps import async_comm_of
from distpatch.layout.rows import even_bounds
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import rank_outcomes, run_ranks
from tests.support.transports.staged import staged
from tests.support.zoo.models import on_ranks, tiny_kl

CPU = torch.device("cpu")


def gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


# Devices


class Group:
    """A process group of these backends, by kind of device."""

    def __init__(self, bound: torch.device | None = None, **backends: str) -> None:
        self.bound_device_id, self.backends = bound, backends
        self._device_types = [torch.device(kind) for kind in backends]

    def _get_backend(self, device: torch.device) -> Any:
        if device.type not in self.backends:
            raise RuntimeError(f"no backend for {device.type}")
        return SimpleNamespace(name=lambda: self.backends[device.type])


BOTH = {"cpu": "gloo", "cuda": "nccl"}
GLOO = {"cpu": "gloo", "cuda": "gloo"}
NCCL = {"cuda": "nccl"}

DEVICES: dict[str, tuple[Group, torch.device | None, torch.device]] = {
    "bound": (Group(gpu(3), **BOTH), None, gpu(3)),
    "bound, model elsewhere": (Group(gpu(3), **BOTH), gpu(1), gpu(3)),
    "the model's": (Group(**BOTH), gpu(1), gpu(1)),
    "the model's, on the CPU": (Group(**BOTH), CPU, CPU),
    "no model": (Group(**BOTH), None, gpu(2)),
    "no weights yet": (Group(**BOTH), torch.device("meta"), gpu(2)),
    "NCCL alone, model still on the CPU": (Group(**NCCL), CPU, gpu(2)),
    "gloo, no model": (Group(**GLOO), None, CPU),
    "gloo, model on a GPU": (Group(**GLOO), gpu(1), gpu(1)),
}


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Of which this is the process with LOCAL_RANK=2."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    yield monkeypatch


@pytest.mark.parametrize(("group", "given", "device"), DEVICES.values(), ids=DEVICES)
def test_device(four_gpus: pytest.MonkeyPatch, group: Any, given: torch.device | None, device: torch.device) -> None:
    assert devices.choose(group, given) == device


def test_device_of_the_process(four_gpus: pytest.MonkeyPatch) -> None:
    group: Any = Group(**BOTH)
    four_gpus.setenv("LOCAL_RANK", "6")  # each process sees some of the GPUs
    assert devices.choose(group, None) == gpu(2)
    four_gpus.delenv("LOCAL_RANK")
    four_gpus.setattr(dist, "get_rank", lambda: 5)
    assert devices.choose(group, None) == gpu(1)
    four_gpus.setattr(torch.cuda, "is_initialized", lambda: True)
    four_gpus.setattr(torch.cuda, "current_device", lambda: 3)
    assert devices.choose(group, None) == gpu(3)  # the program has set it
    four_gpus.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.choose(group, None) == CPU


def test_device_of_a_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, device="meta"), nn.BatchNorm2d(1))
    assert devices.of_model(model) == CPU
    assert devices.of_model(model[0]) is None
    assert devices.of_model(nn.SiLU()) is None


TRANSPORTS = [
    (BOTH, CPU, PointToPoint),
    (BOTH, gpu(0), PointToPoint),
    (GLOO, CPU, PointToPoint),
    (GLOO, gpu(0), Staged),
]
TRANSPORTS += [({"cpu": "gloo"}, gpu(0), Staged), (NCCL, gpu(1), PointToPoint)]


@pytest.mark.parametrize(("backends", "device", "kind"), TRANSPORTS)
def test_transport_of_a_device(backends: dict[str, str], device: torch.device, kind: type) -> None:
    group: Any = Group(**backends)
    assert type(between(group, device)) is kind


def test_no_transport_for_a_device() -> None:
    group: Any = Group(**NCCL)
    with pytest.raises(distpatch.RankError, match=r"no backend for tensors of cpu \(it has cuda\)"):
        between(group, CPU)


class Opened(PointToPoint):
    """NCCL's, as far as it is opened."""

    def open(self, device: torch.device) -> None:
        assert device == gpu(dist.get_rank())


@contextmanager
def nccl(monkeypatch: pytest.MonkeyPatch, hosts: list[str], cards: list[str], backend: str = "nccl") -> Iterator[None]:
    """Every thread-rank on a GPU of its own number, that is this card of this host."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(devices, "backend_name", lambda pg, device: backend)
    monkeypatch.setattr(devices, "current", lambda device: nullcontext())
    monkeypatch.setattr(devices, "host", lambda: hosts[dist.get_rank()])
    monkeypatch.setattr(devices, "card", lambda device: cards[dist.get_rank()])
    with using(lambda pg, device: Opened(pg)):
        yield


SHARED = {
    "two of two": ("aa", "xx", [(0, 1)]),
    "two of three": ("aaa", "xyx", [(0, 2)]),
    "two pairs": ("aabb", "xxyy", [(0, 1), (2, 3)]),
    "each its own": ("aaa", "xyz", []),
    "of that name on two hosts": ("ab", "xx", []),
    "not known": ("aa", ["", ""], []),
}


@pytest.mark.parametrize(("hosts", "cards", "pairs"), SHARED.values(), ids=SHARED)
def test_two_ranks_on_one_gpu(monkeypatch: pytest.MonkeyPatch, hosts: Any, cards: Any, pairs: Any) -> None:
    with nccl(monkeypatch, list(hosts), list(cards)):
        outcomes = rank_outcomes(len(hosts), lambda rank: distpatch.warmup(dist.group.WORLD))
    for rank, outcome in enumerate(outcomes):
        assert (outcome is None) if not pairs else isinstance(outcome, distpatch.RankError), outcome
        for a, b in pairs:
            assert f"ranks {a} and {b} use one GPU, cuda:{a} ({cards[a]}) of {hosts[a]}" in str(outcome)
            assert f"this is rank {rank}" in str(outcome)
            assert 'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))' in str(outcome)


def test_self_test_tells_of_two_ranks_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with nccl(monkeypatch, ["a", "a"], ["x", "x"]):
        for report in run_ranks(2, lambda rank: distpatch.self_test(dist.group.WORLD)):
            assert "ranks 0 and 1 use one GPU" in str(report.faults[0])


def test_two_ranks_may_share_a_gpu_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"device": "cuda:0", "backend": "gloo", "host": "a", "card": "x"}] * 2
    devices.check(answers, 0)
    answers[1] = answers[1] | {"device": "cpu"}  # travels the same way
    devices.check(answers, 0)
    with pytest.raises(distpatch.RankError, match=r"rank 0: cuda:0 \(nccl\), rank 1: cpu \(gloo\)"):
        devices.check([answers[0] | {"backend": "nccl"}, answers[1]], 1)


# Process groups


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
        comm.enter("test", "")
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


def the_lane(rank: int, groups: Any) -> None:
    if rank:
        assert sum_over(async_comm_of(communicator(groups[2]))) == 6


MADE_BY_MEMBERS = [some_ranks, unequal_numbers_of_groups, after_a_failure, one_half_of_a_guidance_mesh]
MADE_BY_MEMBERS += [a_guidance_mesh_of_some_ranks, the_group_of_a_pipeline, the_lane]


@pytest.mark.parametrize("body", MADE_BY_MEMBERS, ids=lambda body: body.__name__)
def test_groups_are_made_by_their_members_alone(body: Any) -> None:
    with splitting(4) as splits:
        run_ranks(4, bound(body))
    assert splits == []


def test_torchcomms_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c10d, "_use_torchcomms_enabled", lambda: True)
    with pytest.raises(distpatch.RankError, match="TORCH_DISTRIBUTED_USE_TORCHCOMMS"):
        process_groups.by_members([0], "name", timeout=timedelta(1))


# What travels

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


# An exception inside a batch


@contextmanager
def planted(rank: int, error: Exception) -> Iterator[list[int]]:
    """torch's batch is left open by an exception on one rank, the first time."""
    left, send = [1], dist.batch_isend_irecv

    def batch(ops: list[Any]) -> Any:
        if dist.get_rank() != rank or not left:
            return send(ops)
        left.pop()
        with c10d._coalescing_manager(ops[0].group):
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", batch)
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

    from distpatch.comm import transport

    group: Any = Collects(**NCCL)
    transport._end_batch(group, gpu(1))
    assert done == ["end on cuda:1", "abort"]


def test_a_single_message_is_a_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL makes another communicator for a message that is sent alone."""
    sizes: list[int] = []
    send = dist.batch_isend_irecv
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda ops: sizes.append(len(ops)) or send(ops))
    bounds, needs = (0, 2, 4), (((0, 0),), ((1, 4),))

    def body(rank: int) -> Tensor:
        name = communicator(dist.group.WORLD).name
        rows = torch.arange(2.0).view(2, 1) + 2 * rank
        return fetch_rows(rows, 0, bounds, needs, name, "test", False)[0]

    assert run_ranks(2, body)[1].flatten().tolist() == [1, 2, 3]
    assert sizes == [1, 1]
