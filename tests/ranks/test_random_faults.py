"""Random faults at random operations in random nets: every rank is told in time, or right; nothing is left behind.

FAULTS=200 in the environment: the long run.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from distpatch.torch_utils import constants
from tests.support import oracle
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import rank_outcomes
from tests.support.transports.nccl import simulated_nccl

FAULTS = int(os.environ.get("FAULTS", "48"))
TO_SETTLE = 8  # faults, in which plans are cached and pools filled
OF_TORCH = 6  # objects that each init_process_group of torch leaves, in sys.excepthook
TIMEOUT_S, LIMIT_S = 20.0, 15.0  # of the groups; that a rank may take until it is told
CHANNELS = 4
TRANSPORTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {"gloo": nullcontext, "NCCL": simulated_nccl}


class Fault(Exception):
    """On purpose, on one rank."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(CHANNELS, 3 * CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    "wide conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 5, padding=4, dilation=2),
    "norm": lambda: nn.GroupNorm(2, CHANNELS),
    "pool": lambda: nn.AvgPool2d(3, stride=2, padding=1),
    "attention": Attention,
    "upsample": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class Scenario:
    """``at``: the layer in which the victim fails; ``again``: another call follows, of another shape."""

    seed: int
    world: int
    layers: tuple[str, ...]
    transport: str
    rows: int
    victim: int
    at: int
    gradients: bool
    backward: bool
    again: bool

    def net(self) -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return nn.Sequential(*(LAYERS[name]() for name in (*self.layers, "conv"))).double()


def scenarios() -> Iterator[Scenario]:
    for seed in range(FAULTS):
        draw = random.Random(seed)
        layers = tuple(draw.choice(list(LAYERS)) for _ in range(draw.randint(2, 6)))
        world, gradients = draw.randint(2, 4), draw.random() < 0.5
        yield Scenario(
            seed,
            world,
            layers,
            draw.choice(list(TRANSPORTS)),
            rows=draw.randint(9, 24),
            victim=draw.randrange(world),
            at=draw.randint(0, len(layers)),
            gradients=gradients,
            backward=gradients and draw.random() < 0.5,
            again=draw.random() < 0.5,
        )


def call(net: nn.Module, rows: int, gradients: bool) -> list[Tensor]:
    """What the net makes of so many rows, and its gradients."""
    net.zero_grad()
    image = random_tensor((1, CHANNELS, rows, 6)).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        result = net(image)
    if not gradients:
        return [result]
    (result * random_tensor(tuple(result.shape), seed=1)).sum().backward()
    found = [image.grad, *(parameter.grad for parameter in net.parameters())]
    return [result.detach(), *(gradient.clone() for gradient in found if gradient is not None)]


def arm(net: nn.Sequential, scenario: Scenario) -> Any:
    """The next time that the layer runs, or its gradients are made, it fails."""

    def fail(*_: Any) -> None:
        raise Fault("on purpose")

    def look_after(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(fail)

    layer = net[scenario.at]
    return layer.register_forward_hook(look_after) if scenario.backward else layer.register_forward_pre_hook(fail)


def run(scenario: Scenario) -> float:
    """The fault, and perhaps a call after it; every rank is told, or has what one device has. Seconds of the slowest."""
    right, right_again = (call(scenario.net(), rows, scenario.gradients) for rows in (scenario.rows, scenario.rows + 3))
    nets = [scenario.net() for _ in range(scenario.world)]  # threads share the random generator
    over = threading.Barrier(scenario.world, timeout=2 * LIMIT_S)
    seconds = [0.0] * scenario.world

    def body(rank: int) -> None:
        net: Any = distpatch.convert_model(nets[rank], dist.group.WORLD)
        hook = arm(net, scenario) if rank == scenario.victim else None
        over.wait()
        started = time.monotonic()
        try:
            compare(call(net, scenario.rows, scenario.gradients), right, f"rank {rank}")
        except Fault:
            assert rank == scenario.victim
        except distpatch.RankError as error:
            assert rank != scenario.victim
            assert f"rank {scenario.victim} raised Fault: on purpose" in str(error), error
        seconds[rank] = time.monotonic() - started
        if hook is not None:
            hook.remove()
        over.wait()
        if scenario.again:
            compare(call(net, scenario.rows + 3, scenario.gradients), right_again, f"rank {rank}, the call after it")
        over.wait()

    with TRANSPORTS[scenario.transport]():
        for outcome in rank_outcomes(scenario.world, body, timeout=TIMEOUT_S):
            if isinstance(outcome, BaseException):
                raise AssertionError(f"{scenario}: {outcome!r}") from outcome
    assert max(seconds) < LIMIT_S, f"{scenario}: {seconds}"
    return max(seconds)


def compare(found: list[Tensor], right: list[Tensor], what: str) -> None:
    assert len(found) == len(right)
    for index, (mine, wanted) in enumerate(zip(found, right, strict=True)):
        scale = wanted.abs().max().clamp(min=1)
        assert_same(mine / scale, wanted / scale, 1e-10, f"{what}, tensor {index}")


def left_behind(threads: int) -> dict[str, int]:
    """What this process has, after what is ending has ended: its watches, down to so many threads. Without constants."""
    constants.forget()
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    gc.collect()
    objects = gc.get_objects()
    files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return {
        "threads": threading.active_count(),
        "threads of the process": len(list(Path("/proc/self/task").iterdir())),
        "sockets": sum(name.startswith("socket:") for name in files),
        "tensors": sum(issubclass(type(found), Tensor) for found in objects),
        "objects": len(objects),
    }


@pytest.mark.slow
@pytest.mark.timeout(60 + 20 * FAULTS)
@pytest.mark.skipif(sys.platform != "linux", reason="counts sockets in /proc")
def test_random_faults() -> None:
    """Of threads, sockets and tensors there are never more; of other objects, where the same faults come again."""
    before: dict[str, int] = {}
    faults, slowest = list(scenarios()), 0.0
    for number, scenario in enumerate(faults):
        slowest = max(slowest, run(scenario))
        if number % TO_SETTLE == TO_SETTLE - 1:
            found = left_behind(before.get("threads", 1))
            before = before or found
            grown = {what: found[what] - before[what] for what in found if what != "objects"}
            assert max(grown.values()) <= 0, f"after {number + 1} faults: {grown}"
    for scenario in faults[:TO_SETTLE]:
        run(scenario)
    objects = left_behind(before["threads"])["objects"] - found["objects"]
    assert objects <= OF_TORCH * sum(scenario.world for scenario in faults[:TO_SETTLE])
    oracle.notes["random faults:"] = [f"{FAULTS}, the slowest told after {slowest:.2f} s; {objects} objects more"]
