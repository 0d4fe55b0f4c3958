"""Ranks as threads of one process, over real gloo: a test with four ranks costs milliseconds.

The only file that uses torch's private multi-threaded process group. Two things are shared between
such ranks and are not between processes: the CPU random generator (pass explicit generators) and
module state (give every rank its own copy of a model).
"""

from __future__ import annotations

import inspect
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import ThreadLocalWorld, _install_threaded_pg

T = TypeVar("T")
Body = Callable[[int], Any]

if not hasattr(ThreadLocalWorld, "comms"):  # of torch 2.11
    ThreadLocalWorld.comms = property(lambda self: [])
_install_threaded_pg()
# torch 2.11's recorder of all collectives is not thread-safe: two new groups' first ones end in a segmentation fault.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")
torch._C._distributed_c10d._set_thread_isolation_mode(True)


def run_ranks(world_size: int, body: Callable[[int], T], *, timeout: float = 10.0, keep: bool = False) -> list[T]:
    """``body(rank)`` on every rank; what each returned. The exception of the rank that failed first is
    raised again, with a note that names the rank. ``keep``: the ranks and their group are kept for the
    next call of this kind, until one fails."""
    if keep:
        ranks = _kept.pop(world_size, None) or _Ranks(world_size, timeout)
        outcomes, failed = ranks.run(body)
        if failed:
            ranks.close()
        else:
            _kept[world_size] = ranks
    else:
        outcomes, failed = _once(world_size, body, timeout)
    if failed:
        error = outcomes[failed[0]]
        assert isinstance(error, BaseException)
        if hasattr(error, "add_note"):
            error.add_note(f"raised first by rank {failed[0]} of {world_size}; failed after it: {failed[1:]}")
        raise error
    return outcomes


def rank_outcomes(world_size: int, body: Body, *, timeout: float = 10.0) -> list[Any]:
    """Like ``run_ranks``, but a rank that raised has its exception as its result."""
    return _once(world_size, body, timeout)[0]


def close_kept() -> None:
    """End the ranks that were kept."""
    while _kept:
        _kept.popitem()[1].close()


def turned_group() -> dist.ProcessGroup:
    """Another group of both ranks, which stand in another order where this torch can do that."""
    if "sort_ranks" in inspect.signature(dist.new_group).parameters:  # since torch 2.12
        return dist.new_group([1, 0], sort_ranks=False)
    return dist.new_group([0, 1])


def _once(world_size: int, body: Body, timeout: float) -> tuple[list[Any], list[int]]:
    ranks = _Ranks(world_size, timeout)
    outcomes, failed = ranks.run(body)
    ranks.close()
    return outcomes, failed


class _Ranks:
    """One thread a rank, each with its default process group, that run one body after another.

    A rank whose body fails closes its group and ends: the others, which may wait for it, see that.
    """

    def __init__(self, world_size: int, timeout: float) -> None:
        self.world_size, self.timeout = world_size, timeout
        self.store = dist.HashStore()
        self.outcomes: list[Any] = [None] * world_size
        self.failed: list[int] = []
        self.done = threading.Semaphore(0)
        self.bodies: list[queue.SimpleQueue[Body | None]] = [queue.SimpleQueue() for _ in range(world_size)]
        self.threads = [
            threading.Thread(target=self._main, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(world_size)
        ]
        for thread in self.threads:
            thread.start()

    def run(self, body: Body) -> tuple[list[Any], list[int]]:
        """Outcomes by rank, and the ranks that failed in the order in which they did."""
        for bodies in self.bodies:
            bodies.put(body)
        # A rank may wait for a dead one at several places, one timeout each; a live one computes meanwhile.
        deadline = time.monotonic() + 10 * self.timeout + 60
        for _ in self.threads:
            if not self.done.acquire(timeout=max(deadline - time.monotonic(), 0)):
                self._raise_stuck()
        outcomes, self.outcomes = self.outcomes, [None] * self.world_size
        return outcomes, self.failed

    def close(self) -> None:
        for bodies in self.bodies:
            bodies.put(None)
        for thread in self.threads:
            thread.join(10)

    def _main(self, rank: int) -> None:
        try:
            dist.init_process_group(
                "gloo",
                store=self.store,
                rank=rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self.timeout),
            )
            while (body := self.bodies[rank].get()) is not None:
                self.outcomes[rank] = body(rank)
                del body
                self.done.release()
        except BaseException as error:
            self.outcomes[rank] = error
            self.failed.append(rank)  # before the group is closed: the others fail by that
        if dist.is_initialized():
            dist.destroy_process_group()
        self.done.release()

    def _raise_stuck(self) -> None:
        stuck = {thread.name: _stack(thread) for thread in self.threads if thread.is_alive()}
        where = "\n".join(f"{name}:\n{stack}" for name, stack in stuck.items())
        raise TimeoutError(f"{', '.join(stuck)} of {self.world_size} did not end\n{where}")


_kept: dict[int, _Ranks] = {}


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)[-6:]) if frame else ""
