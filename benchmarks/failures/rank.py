"""One rank: a call that succeeds, then one in which a rank fails. It says so over a pipe, for the parent's clock."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import distpatch
from tests.support.transports.nccl import simulated_nccl

RANKS = 3
SHAPE = (1, 3, 27, 16)
TEXT = "on purpose"
Fail = Callable[[], None]  # what a rank does in the middle of a call: nothing, or it fails
Attempt = Callable[[], object]
NO_MEMORY_BYTES = 1 << 60
_in_the_middle: list[Fail] = []  # of a compiled call


@torch.library.custom_op("benchmarks_failures::middle", mutates_args=())
def middle(x: Tensor) -> Tensor:
    for act in _in_the_middle:
        act()
    return x.clone()


@middle.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


distpatch.register_pointwise(middle)


class Net(nn.Module):
    """Halos before and after the place where a rank fails, and the statistics of a norm."""

    def __init__(self, *, with_operator: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.middle, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.with_operator = with_operator

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(F.silu(self.norm(self.first(x))))
        if self.with_operator:
            y = middle(y)
        return x + self.last(y)


def converted(with_operator: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    return distpatch.convert_model(Net(with_operator=with_operator), dist.group.WORLD, **options)


# Where it fails: each makes what is called well once, then with ``fail``.


def forward(fail: Fail, folder: Path) -> Iterator[Attempt]:
    net = converted()
    with torch.no_grad():
        yield lambda: net(torch.ones(SHAPE))
        net.middle.register_forward_pre_hook(lambda module, args: fail())
        yield lambda: net(torch.ones(SHAPE))


def backward(fail: Fail, folder: Path) -> Iterator[Attempt]:
    net = converted()
    yield lambda: net(torch.ones(SHAPE)).sum().backward()

    def look_after(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: fail())

    net.middle.register_forward_hook(look_after)
    yield lambda: net(torch.ones(SHAPE)).sum().backward()


def displaced(fail: Fail, folder: Path) -> Iterator[Attempt]:
    net = converted()
    with torch.no_grad(), distpatch.displaced(net, warmup_steps=1):

        def steps() -> None:
            for _ in range(4):
                net(torch.ones(SHAPE))

        yield steps
        net.middle.register_forward_pre_hook(lambda module, args: fail())
        yield steps


def compiled(fail: Fail, folder: Path) -> Iterator[Attempt]:
    net = torch.compile(converted(with_operator=True), fullgraph=True, backend="aot_eager")
    return in_the_middle(net, fail)


def with_compile(fail: Fail, folder: Path) -> Iterator[Attempt]:
    return in_the_middle(converted(with_operator=True, compile={"backend": "aot_eager"}), fail)


def in_the_middle(net: Any, fail: Fail) -> Iterator[Attempt]:
    with torch.no_grad():
        yield lambda: net(torch.ones(SHAPE))
        _in_the_middle.append(fail)
        yield lambda: net(torch.ones(SHAPE))


def video(fail: Fail, folder: Path) -> Iterator[Attempt]:
    batch, channels, height, width = SHAPE
    clip = distpatch.shard(torch.ones(batch, channels, 4, height, width), dist.group.WORLD)
    path = folder / "clip.mp4"
    yield lambda: distpatch.save_video(clip, path)

    def saved() -> None:
        with Acts(fail):
            distpatch.save_video(clip, path)

    yield saved


class Acts(TorchDispatchMode):
    """In the middle of what torch computes."""

    def __init__(self, act: Fail) -> None:
        super().__init__()
        self.act, self.calls = act, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls == 4:
            self.act()
        return func(*args, **(kwargs or {}))


# How it fails.


def raises(pipe: Connection) -> NoReturn:
    pipe.send(("fails", "", ""))
    raise ValueError(TEXT)


def out_of_memory(pipe: Connection) -> None:
    pipe.send(("fails", "", ""))
    torch.empty(NO_MEMORY_BYTES, dtype=torch.uint8)


def exits(pipe: Connection) -> NoReturn:
    pipe.send(("fails", "", ""))
    os._exit(1)


def waits_for_a_signal(pipe: Connection) -> None:
    """Which the parent sends."""
    pipe.send(("fails", "", ""))
    time.sleep(3600)


def run(
    pipe: Connection,
    rank: int,
    victim: int,
    where: Any,
    how: Any,
    nccl: bool,
    join: Callable[[int], None],
    folder: Path,
) -> None:
    """One process. Says "ready", then what it was told: an error's type and text. ``folder``: to write to."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        if nccl:
            stack.enter_context(simulated_nccl())
        join(rank)
        attempts = where((lambda: how(pipe)) if rank == victim else (lambda: None), folder)
        next(attempts)()
        attempt = next(attempts)
        dist.barrier()
        pipe.send(("ready", "", ""))
        pipe.recv()
        try:
            attempt()
        except BaseException as error:
            pipe.send(("error", type(error).__name__, str(error)))
        else:
            pipe.send(("no error", "", ""))
        with contextlib.suppress(EOFError):
            pipe.recv()  # until the parent ends it
    os._exit(0)


def join_agent(port: int, rank: int) -> None:
    """As under torchrun: a process that outlives the ranks keeps the store."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)


def join_url(url: str, rank: int) -> None:
    """``tcp://``: rank 0 keeps the store; ``file://``: a file is it."""
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=RANKS)
