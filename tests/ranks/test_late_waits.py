"""Where a wait ends before all has landed, as on a GPU: the host runs ahead, and may wait for it anywhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from distpatch.comm.communicator import communicator
from distpatch.comm.connection import Connection
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import rank_outcomes, run_ranks
from tests.support.transports.nccl import SimulatedNCCL, simulated_nccl

WORLD, VICTIM = 3, 1
TIMEOUT_S, LIMIT_S = 120.0, 15.0  # of the group; that a rank may take until it is told
CPU = torch.device("cpu")


class Fault(Exception):
    """On purpose, on one rank."""


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)), nn.Identity())
        self.double()


def synchronize(*_: Any) -> None:
    """As ``.item()`` of a tensor of the GPU."""
    transport: Any = communicator(dist.group.WORLD).transport(CPU)
    while not isinstance(transport, SimulatedNCCL):
        transport = transport.inner
    transport.synchronize()


def fail(*_: Any) -> None:
    raise Fault("on purpose")


def told(call: Callable[[], object]) -> str:
    """What a rank is told, within the limit; the victim has its own exception."""
    started = time.monotonic()
    message = ""
    try:
        call()
    except Fault:
        message = "its own"
    except distpatch.RankError as error:
        message = str(error)
    assert time.monotonic() - started < LIMIT_S
    return message


def assert_all_told(messages: list[Any]) -> None:
    for rank, message in enumerate(messages):
        assert (message == "its own") if rank == VICTIM else ("rank 1 raised Fault: on purpose" in message), message


def in_a_model(net: Any, rank: int) -> None:
    net[3].register_forward_hook(synchronize)
    if rank == VICTIM:
        net[1].register_forward_pre_hook(fail)
    with torch.no_grad():
        net(random_tensor((1, 3, 12, 5)))


def in_a_backward_pass(net: Any, rank: int) -> None:
    """Nothing waits after it but the check of the pass itself: gradients that are wrong must not be used."""
    result = net(random_tensor((1, 3, 12, 5)).requires_grad_())
    if rank == VICTIM:
        result.register_hook(fail)
    result.sum().backward()


def in_a_hook_of_a_gradient(net: Any, rank: int) -> None:
    leaf = random_tensor((1, 3, 12, 5)).requires_grad_()
    leaf.register_hook(synchronize)
    result = net(leaf)
    if rank == VICTIM:
        result.register_hook(fail)
    result.sum().backward()


@pytest.mark.parametrize("where", [in_a_model, in_a_backward_pass, in_a_hook_of_a_gradient])
def test_every_rank_is_told(where: Callable[[Any, int], None]) -> None:
    nets = [Net() for _ in range(WORLD)]  # threads share the random generator

    def body(rank: int) -> str:
        net = distpatch.convert_model(nets[rank], dist.group.WORLD)
        return told(lambda: where(net, rank))

    with simulated_nccl(runs_ahead=True):
        assert_all_told(rank_outcomes(WORLD, body, timeout=TIMEOUT_S))


def test_a_late_check() -> None:
    """The call that fails returns something on the others; the next call raises, on all, and the one after is right."""
    image = random_tensor((1, 3, 12, 5))
    with torch.no_grad():
        right = Net()(image)
    nets, over = [Net() for _ in range(WORLD)], threading.Barrier(WORLD, timeout=TIMEOUT_S)

    def body(rank: int) -> tuple[str, str, Tensor]:
        net: Any = distpatch.convert_model(nets[rank], dist.group.WORLD, late_check=True)
        hook = net[1].register_forward_pre_hook(fail) if rank == VICTIM else None
        with torch.no_grad():
            first = told(lambda: net(image))
            if hook is not None:
                hook.remove()
            over.wait()
            return first, told(lambda: net(image)), net(image)

    with simulated_nccl(runs_ahead=True):
        for rank, (first, second, result) in enumerate(run_ranks(WORLD, body, timeout=TIMEOUT_S)):
            assert first == "its own" if rank == VICTIM else not first or "rank 1 raised Fault" in first
            assert "the call before it" in second and "rank 1 raised Fault: on purpose" in second, second
            assert_same(result, right, 1e-11, f"rank {rank}")


def test_a_late_check_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing fails: no wait at the end of a call, the same results, nothing kept of calls that have ended."""
    image = random_tensor((1, 3, 12, 5))
    with torch.no_grad():
        right = Net()(image)
    nets, waits = [Net() for _ in range(WORLD)], []
    look = Connection._look

    def count(self: Connection, wait: bool) -> None:
        waits.append(wait)
        look(self, wait)

    monkeypatch.setattr(Connection, "_look", count)

    def body(rank: int) -> None:
        net: Any = distpatch.convert_model(nets[rank], dist.group.WORLD, late_check=True)
        waits.clear()
        for _ in range(5):
            with torch.no_grad():
                assert_same(net(image), right, 1e-11, f"rank {rank}")
        synchronize()
        comm = communicator(dist.group.WORLD)
        comm.begin_call("the end", "")
        (connection,) = comm._connections()
        assert connection.failures.waiting_since is None and not connection._landing

    with simulated_nccl():
        run_ranks(WORLD, body, timeout=TIMEOUT_S)
    assert waits and not any(waits)


def test_outside_a_call() -> None:
    """Of a sharded result something is computed: when that is there, it is whole."""
    nets = [Net() for _ in range(WORLD)]

    def body(rank: int) -> None:
        net: Any = distpatch.convert_model(nets[rank], dist.group.WORLD, output="shard")
        with torch.no_grad():
            result = net(random_tensor((1, 3, 12, 5)))
            (connection,) = communicator(dist.group.WORLD)._connections()
            for computed in (result.mean(), distpatch.gather(result), result.cumsum(2)):
                assert computed is not None and connection.failures.waiting_since is None

    with simulated_nccl():
        run_ranks(WORLD, body, timeout=TIMEOUT_S)


def test_a_backward_pass_waits_for_no_other_group_s_messages() -> None:
    """Those of another thread's group may need this one: several backward passes at once, some later than others."""
    x, weight = random_tensor((1, 3, 12, 5)), random_tensor((3, 3, 3, 3))

    def body(rank: int) -> None:
        for _ in range(3):
            leaf = x.clone().requires_grad_()
            image = distpatch.shard(leaf, dist.group.WORLD)
            result = nn.functional.conv2d(image, weight, padding=1)
            time.sleep(0.1 * rank)
            result.square().sum().backward()
            assert leaf.grad is not None

    with simulated_nccl():
        run_ranks(WORLD, body, timeout=TIMEOUT_S)
