"""Cores of this host for each of its ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def own_cores(rank: int, ranks: int, threads: int) -> Iterator[None]:
    """While it is open, this thread, and those that it starts, run on ``threads`` cores that no other rank has.

    ``rank`` of ``ranks`` of this host. A rank that is moved to a core which another one computes on waits for its
    time slice to end, and all ranks with it. Nothing is changed where the program may not use so many cores (Slurm or
    ``taskset`` may have given each rank its own), or where the system cannot bind threads.
    """
    free = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if ranks < 2 or ranks * threads > len(free):
        yield
        return
    os.sched_setaffinity(0, free[rank * threads : (rank + 1) * threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, free)
