"""A pool of real processes: started once, then a test on four ranks costs milliseconds.

Each task is a top-level function ``body(rank, *args)`` and gets a process group of its own, made over a
store that the test process keeps: a rank that dies does not take the rendezvous with it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


class Died(Exception):
    """The process of a rank ended without an answer."""


class Pool:
    """``size`` processes that wait for work; call ``close`` at the end."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.procs.bodies"])  # imports torch once for all
        self.backend = backend
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.tasks = 0
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.store.port, backend), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def outcomes(self, world: int, body: Callable[..., Any], *args: Any, timeout: float = 10.0) -> list[Any]:
        """What ``body(rank, *args)`` returned on each of ``world`` ranks, or the exception it raised."""
        self.tasks += 1
        for rank, pipe in enumerate(self.pipes[:world]):
            pipe.send_bytes(pickle.dumps((self.tasks, world, rank, body, args, timeout)))
        deadline = time.monotonic() + 10 * timeout + 60
        return [self._answer(rank, deadline) for rank in range(world)]

    def run(self, world: int, body: Callable[..., Any], *args: Any, timeout: float = 10.0) -> list[Any]:
        """Like ``outcomes``; the first exception by rank is raised."""
        outcomes = self.outcomes(world, body, *args, timeout=timeout)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes

    def _answer(self, rank: int, deadline: float) -> Any:
        while self.pipes[rank].poll(max(deadline - time.monotonic(), 0)):
            try:
                task, answer = pickle.loads(self.pipes[rank].recv_bytes())
            except EOFError:
                self.processes[rank].join()
                return Died(f"rank {rank} ended with code {self.processes[rank].exitcode}")
            if task == self.tasks:  # else it is that of a test that was stopped while it waited for it
                return answer
        return TimeoutError(f"rank {rank} gave no answer")

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(pipe: Connection, port: int, backend: str) -> None:
    """The loop of one process; it ends when the pool closes its end of the pipe."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            task, world, rank, body, args, timeout = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        try:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"task {task}", store),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
            )
            try:
                answer = body(rank, *args)
            finally:
                dist.destroy_process_group()
        except SystemExit:
            raise
        except BaseException as error:
            answer = error
        try:
            message = pickle.dumps((task, answer))
        except Exception as error:
            message = pickle.dumps((task, TypeError(f"{answer!r} cannot be sent back: {error}")))
        pipe.send_bytes(message)
