"""gloo's threads that read and write sockets, and how the kernel schedules them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

THREADS = Path("/proc/self/task")
NAMES = ("gloo_tcp_loop",)  # the kernel's, of 15 characters at most


@contextlib.contextmanager
def made_without_preemption() -> Iterator[None]:
    """Those that are made meanwhile never take a core from a thread that runs when they wake (Linux's SCHED_BATCH).

    gloo's thread polls, over and over, a connection whose lock another thread holds. Where the kernel runs it in
    place of that thread, both stand until its time slice is over, which is far longer than a message takes. Threads of
    a program's other groups are left as they are.
    """
    if not hasattr(os, "SCHED_BATCH") or not THREADS.is_dir():
        yield
        return
    before = running()
    yield
    for thread in running() - before:
        with contextlib.suppress(OSError):  # it has ended, or a sandbox forbids it
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def running() -> set[int]:
    """Their thread ids, in this process."""
    found = set()
    for thread in THREADS.iterdir():
        with contextlib.suppress(OSError):
            if (thread / "comm").read_text().strip() in NAMES:
                found.add(int(thread.name))
    return found
