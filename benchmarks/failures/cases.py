"""Which rank fails, where and how; a case is run by processes of its own, timed by the parent."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.failures import rank as ranks
from benchmarks.failures.rank import RANKS, TEXT

START_S = 180  # to start processes, compile, and make one good call
AGENT, RANK_0, FILE = "TCP", "TCP, kept by the rank that fails", "file://"
TRANSPORTS = ("gloo", "simulated NCCL")


@dataclass(frozen=True)
class Failure:
    """``said``: what must be in the error of each other rank, after the failed one's name."""

    name: str
    where: Any
    how: Any
    said: tuple[str, ...]
    signal: int = 0


RAISED = (f"raised ValueError: {TEXT}",)
FAILURES = [
    Failure("raises an exception", ranks.forward, ranks.raises, RAISED),
    Failure("raises in backward", ranks.backward, ranks.raises, RAISED),
    Failure("out of memory", ranks.forward, ranks.out_of_memory, ("raised RuntimeError: ", "can't allocate memory")),
    Failure("ends (`os._exit`)", ranks.forward, ranks.exits, ("has ended",)),
    Failure("is killed (SIGKILL)", ranks.forward, ranks.waits_for_a_signal, ("has ended",), signal.SIGKILL),
    Failure("is stopped (SIGSTOP)", ranks.forward, ranks.waits_for_a_signal, ("is stopped",), signal.SIGSTOP),
    Failure("raises in a displaced step", ranks.displaced, ranks.raises, RAISED),
    Failure("raises in a compiled call", ranks.compiled, ranks.raises, RAISED),
    Failure("raises in a call with `compile=`", ranks.with_compile, ranks.raises, RAISED),
    Failure("raises in `save_video`", ranks.video, ranks.raises, RAISED),
]


@dataclass(frozen=True)
class Case:
    failure: Failure
    transport: str
    store: str = AGENT
    victim: int = 1


@dataclass
class Told:
    """What one rank was told. ``seconds``: after the failure; None: nothing within the limit."""

    rank: int
    seconds: float | None = None
    kind: str = ""
    text: str = ""
    names: bool = False


@dataclass
class Outcome:
    case: Case
    told: list[Told] = field(default_factory=list)
    problem: str = ""

    @property
    def slowest(self) -> float | None:
        """Seconds until the last rank was told; None: one of them never was."""
        seconds = [told.seconds for told in self.told if told.seconds is not None]
        return max(seconds) if seconds and len(seconds) == len(self.told) else None

    @property
    def named(self) -> bool:
        return bool(self.told) and all(told.names for told in self.told)


def all_cases() -> list[Case]:
    """Every failure over both transports; other stores where the way to the store matters."""
    cases = [Case(failure, transport) for failure in FAILURES for transport in TRANSPORTS]
    cases += [Case(f, t, RANK_0, victim=0) for f in FAILURES if f.signal for t in TRANSPORTS]
    return cases + [Case(f, "gloo", FILE) for f in FAILURES if f.where is ranks.forward]


def run(case: Case, limit_s: float) -> Outcome:
    """The ranks are started, fail, and are killed after ``limit_s`` at the latest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.failures.rank"])  # imports torch once for all
    outcome = Outcome(case)
    with tempfile.TemporaryDirectory() as name, _meeting_place(case.store, Path(name)) as join:
        pipes, processes = [], []
        for rank in range(RANKS):
            mine, theirs = context.Pipe()
            nccl = case.transport != "gloo"
            args = (theirs, rank, case.victim, case.failure.where, case.failure.how, nccl, join, Path(name))
            process = context.Process(target=ranks.run, args=args, daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            outcome.problem = _run(case, outcome, pipes, [p.pid or 0 for p in processes], limit_s)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
    return outcome


def _run(case: Case, outcome: Outcome, pipes: list[Connection], pids: list[int], limit_s: float) -> str:
    deadline = time.monotonic() + START_S
    for rank, pipe in enumerate(pipes):
        try:
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                return f"rank {rank} did not get ready"
            answer = pipe.recv()
        except EOFError:
            return f"rank {rank} ended before it was ready"
        if answer[0] != "ready":
            return f"rank {rank}: {answer}"
    for pipe in pipes:
        pipe.send("go")
    pipes[case.victim].poll(START_S)
    pipes[case.victim].recv()
    failed = time.monotonic()
    if case.failure.signal:
        os.kill(pids[case.victim], case.failure.signal)
    left = {pipe: rank for rank, pipe in enumerate(pipes) if rank != case.victim}
    while left and (ready := wait(list(left), max(failed + limit_s - time.monotonic(), 0))):
        for pipe in ready:
            outcome.told.append(_told(case, left.pop(pipe), pipe, failed))  # type: ignore[call-overload]
    outcome.told += [Told(rank) for rank in left.values()]
    outcome.told.sort(key=lambda told: told.rank)
    return ""


def _told(case: Case, rank: int, pipe: Connection, failed: float) -> Told:
    try:
        _, kind, text = pipe.recv()
    except EOFError:
        return Told(rank, None, "", "its process ended, too")
    names = f"rank {case.victim}" in text and all(said in text for said in case.failure.said)
    return Told(rank, time.monotonic() - failed, kind, text, names)


@contextmanager
def _meeting_place(store: str, folder: Path) -> Iterator[Any]:
    """How the ranks join their group."""
    if store == AGENT:
        agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        yield functools.partial(ranks.join_agent, agent.port)
    elif store == FILE:
        yield functools.partial(ranks.join_url, f"file://{folder / 'store'}")
    else:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        yield functools.partial(ranks.join_url, f"tcp://127.0.0.1:{port}")
