"""Several processes as the ranks of a group, each with what it returned, how it failed, or its silence."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.environment import set_precision
from benchmarks.gpu.section import reason

Say = Callable[[str, Any], None]
Body = Callable[[Any, torch.device, Say], Any]
SILENT = "no word within the time given"


@dataclass
class Outcome:
    """Of one rank: ``status`` "ok", "failed" or "silent"; what it returned or why it failed; what it said before."""

    status: str = "silent"
    value: Any = SILENT
    said: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.status == "ok"


GRACE_S = 1.0
END = ""


def in_processes(
    world: int, body: Body, *, backend: str, gpus: int, seconds: float, timeout_s: float = 30.0
) -> list[Outcome]:
    """What became of ``body(group, device, say)``, by rank; ``say(name, value)`` tells something before the end.

    They are forked, so that they start at once: this process must not have used a GPU yet. ``gpus``: rank r has GPU r
    modulo so many; 0 is the CPU. ``timeout_s``: the group's. None is left running when this returns.
    """
    context = multiprocessing.get_context("fork")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        context.Process(target=_rank, args=(r, world, body, backend, gpus, store.port, timeout_s, pipes[r][1]))
        for r in range(world)
    ]
    for process in ranks:
        process.start()
    for _, mine in pipes:
        mine.close()
    outcomes = [Outcome() for _ in range(world)]
    waiting: dict[Any, int] = {theirs: r for r, (theirs, _) in enumerate(pipes)}
    deadline = time.monotonic() + seconds
    while waiting and (left := deadline - time.monotonic()) > 0:
        for theirs in wait(list(waiting), left):
            r = waiting[theirs]
            try:
                name, value = theirs.recv()  # type: ignore[union-attr]
            except EOFError:
                ranks[r].join(GRACE_S)
                name, value = END, ("failed", f"the process ended with code {ranks[r].exitcode}")
            if name == END:
                outcomes[r].status, outcomes[r].value = value
                del waiting[theirs]
            else:
                outcomes[r].said[name] = value
    for process in ranks:
        process.join(GRACE_S if not waiting else 0)
        if process.is_alive():
            process.kill()
            process.join()
    return outcomes


def _rank(
    rank: int, world: int, body: Body, backend: str, gpus: int, port: int, timeout_s: float, answers: Connection
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % max(gpus, 1)), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    device = torch.device("cpu")
    try:
        if gpus:
            device = torch.device("cuda", rank % gpus)
            torch.cuda.set_device(device)
        set_precision()
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout_s))
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if backend == "nccl" else None,
        )
        outcome = ("ok", body(dist.group.WORLD, device, lambda name, value: answers.send((name, value))))
    except BaseException as error:
        outcome = ("failed", reason(error))
    answers.send((END, outcome))
    answers.close()
    os._exit(0)  # a group with a rank that failed may not close


def failures(outcomes: list[Outcome]) -> str:
    """Which ranks did not end well, and why."""
    return "; ".join(f"rank {r} {o.status}: {o.value}" for r, o in enumerate(outcomes) if not o)
