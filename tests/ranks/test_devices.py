"""Which device and which transport a group of ranks gets; two ranks on one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distpatch
from distpatch.comm import devices
from distpatch.comm.choose_transport import between, using
from distpatch.comm.point_to_point import PointToPoint
from distpatch.comm.staged import Staged
from tests.support.fake_groups import BOTH, CPU, GLOO, NCCL, Group, gpu
from tests.support.threads import rank_outcomes, run_ranks

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
