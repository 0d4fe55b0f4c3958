"""What the pool's processes run: top-level functions of the rank, which they import by name."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from distpatch.comm import io_threads, processes
from tests.support import forced as _forced  # noqa: F401  where the suite runs so
from tests.support.oracle import random_tensor
from tests.support.transports.nccl import simulated_nccl
from tests.support.zoo.models import tiny_kl

SHAPE = (1, 3, 27, 16)


def threads_of_sockets(rank: int) -> tuple[list[int], list[int]]:
    """How the kernel schedules gloo's threads: those of the program's groups, and those that distpatch has added."""
    before = io_threads.running()
    distpatch.convert_model(tiny_kl(), dist.group.WORLD)(random_tensor(SHAPE))
    return policies(before), policies(io_threads.running() - before)


def policies(threads: set[int]) -> list[int]:
    """Of those that still run: an earlier test's groups may end their threads at any time."""
    found = []
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):
            found.append(os.sched_getscheduler(thread))
    return found


def round_trip(rank: int, device: str = "cpu", sharded: bool = True) -> dict[str, Tensor]:
    """Encode and decode, forward and backward: the image, and the gradients of input and weights."""
    model = tiny_kl().to(device)
    if sharded:
        distpatch.convert_model(model, dist.group.WORLD, fallback="error")
    leaf = random_tensor(SHAPE).to(device).requires_grad_()
    image = model(leaf).sample
    (image * random_tensor(tuple(image.shape), seed=1).to(device)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name: t.detach().cpu() for name, t in {"image": image, "x": leaf.grad, **gradients}.items() if t is not None
    }


def subgroup(rank: int, members: list[int]) -> Tensor | None:
    """The decoder on some of the ranks."""
    group = dist.new_group(members)
    if rank not in members:
        return None
    model = distpatch.convert_model(tiny_kl(), group, fallback="error")
    with torch.no_grad():
        return model.decode(random_tensor((1, 4, 7, 5))).sample


def one_gpu_for_all(rank: int) -> str:
    """A model that every rank has put on the first GPU."""
    try:
        distpatch.convert_model(tiny_kl().to("cuda:0"), dist.group.WORLD)
    except distpatch.RankError as error:
        return str(error)
    return "no error"


def mismatch(rank: int, device: str = "cpu") -> tuple[str, Tensor]:
    """A call with other shapes on one rank, then a proper one."""
    model = distpatch.convert_model(tiny_kl().to(device), dist.group.WORLD)
    message = ""
    with torch.no_grad():
        try:
            model.decode(random_tensor((1, 4, 7 + (rank == 1), 5)).to(device))
        except distpatch.RankError as error:
            message = str(error)
        return message, model.decode(random_tensor((1, 4, 7, 5)).to(device)).sample.cpu()


def dies(rank: int, victim: int, block: str) -> str:
    """One rank is killed as it reaches a block of the decoder; what the others say."""
    model: Any = distpatch.convert_model(tiny_kl(), dist.group.WORLD)

    def kill(module: nn.Module, args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim:
        model.decoder.get_submodule(block).register_forward_pre_hook(kill)
    try:
        with torch.no_grad():
            model.decode(random_tensor((1, 4, 12, 5)))
    except distpatch.RankError as error:
        return str(error)
    return "no error"


def dies_between_calls(rank: int, victim: int) -> str:
    """One rank is killed after a call; what the others say at the next."""
    model: Any = distpatch.convert_model(tiny_kl(), dist.group.WORLD)
    with torch.no_grad():
        model.decode(random_tensor((1, 4, 12, 5)))
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            model.decode(random_tensor((1, 4, 12, 5)))
        except distpatch.RankError as error:
            return str(error)
    return "no error"


def raises(rank: int) -> None:
    dist.barrier()  # the other rank may still be connecting
    raise ValueError(f"rank {rank}")


@contextlib.contextmanager
def as_if_on(hosts: str, rank: int) -> Iterator[None]:
    """``hosts``: "each": every rank is on a host of its own, and sees no other process."""
    before = processes._host
    if hosts == "each":
        processes._host = lambda: f"host {rank}"
    try:
        yield
    finally:
        processes._host = before


def is_stopped(rank: int, victim: int, hosts: str, seconds: float) -> tuple[str, Tensor]:
    """One rank's process is stopped in a call, and goes on later; what all say, and a call after that."""
    with as_if_on(hosts, rank), torch.no_grad():
        model: Any = distpatch.convert_model(tiny_kl(), dist.group.WORLD, liveness=1.0)
        message, goes_on = "no error", time.monotonic() + seconds + 2

        def stop(module: nn.Module, args: Any) -> None:
            subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)

        hook = model.decoder.mid_block.register_forward_pre_hook(stop) if rank == victim else None
        try:
            model.decode(random_tensor((1, 4, 12, 5)))
        except distpatch.RankError as error:
            message = str(error)
        if hook is not None:
            hook.remove()
        time.sleep(max(goes_on - time.monotonic(), 0))
        return message, model.decode(random_tensor((1, 4, 12, 5))).sample


def leaves_early(rank: int, nccl: bool) -> tuple[Any, str]:
    """Rank 1 ends as soon as it has sent its rows, long before rank 2; then the others call once more."""
    with simulated_nccl() if nccl else contextlib.nullcontext(), torch.no_grad():
        model: Any = distpatch.convert_model(tiny_kl(), dist.group.WORLD, output="rank0")
        if rank == 2:
            model.decoder.register_forward_hook(lambda *_: time.sleep(2))
        image = model.decode(random_tensor((1, 4, 12, 5))).sample
        if rank == 1:
            sys.exit()
        try:
            model.decode(random_tensor((1, 4, 12, 5)))
        except distpatch.RankError as error:
            return image, str(error)
        return image, "no error"


def computes_alone(rank: int, slow: int, way: str, hosts: str) -> Tensor:
    """One rank computes for five seconds while the others wait for its rows, with ``liveness=0.5``."""
    with as_if_on(hosts, rank), torch.no_grad():
        model: Any = distpatch.convert_model(tiny_kl(), dist.group.WORLD, liveness=0.5)

        def compute(module: nn.Module, args: Any) -> None:
            end = time.monotonic() + 5
            count, matrix = 0, torch.ones(300, 300)
            while time.monotonic() < end:
                if way == "Python":
                    count += sum(number * number for number in range(1000))
                else:
                    matrix = (matrix @ matrix).clamp(max=1)

        if rank == slow:
            model.decoder.mid_block.register_forward_pre_hook(compute)
        return model.decode(random_tensor((1, 4, 12, 5))).sample
