"""Cores of this host for each of its ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_cores(place: torch.device, rank: int, ranks: int, threads: int) -> Iterator[None]:
    """While it is open, this thread, and those that it starts, run on this rank's share of the host's cores.

    ``rank`` of ``ranks`` of this host, each with ``threads`` that compute. A rank that is moved to a core which another
    one computes on waits for its time slice to end, and all ranks with it. Nothing is changed on other devices than
    the CPU, where the host has not a core for each thread, where somebody (Slurm, ``taskset``) has chosen cores, or
    where the system binds no threads.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    chosen = len(cores) != os.cpu_count()
    if place.type != "cpu" or ranks < 2 or chosen or ranks * threads > len(cores):
        yield
        return
    os.sched_setaffinity(0, cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
