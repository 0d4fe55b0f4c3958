"""What the ranks' meeting before each call costs, seen from inside: for benchmarks, which use public names only."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from distpatch.comm.communicator import communicator


class Counting:
    """A store that counts what is asked of it."""

    def __init__(self, store: Any) -> None:
        self.store, self.count = store, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.count[name] += 1
        return getattr(self.store, name)


def requests_of(call: Callable[[], object], calls: int) -> dict[str, float]:
    """Requests to the store, by name, that this rank makes for one call of the default group."""
    rendezvous: Any = communicator(dist.group.WORLD).rendezvous
    counting = rendezvous.store = Counting(rendezvous.store)
    for _ in range(calls):
        call()
    rendezvous.store = counting.store
    return {name: count / calls for name, count in counting.count.items()}


def milliseconds_of(meetings: int) -> float:
    """Of one meeting of the default group, the mean of so many."""
    rendezvous = communicator(dist.group.WORLD).rendezvous
    dist.barrier()
    started = time.perf_counter()
    for _ in range(meetings):
        rendezvous.require_same_call("measured", "the same")
    return 1e3 * (time.perf_counter() - started) / meetings
