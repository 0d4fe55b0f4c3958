"""A transport on which everything takes longer: what a transfer or a collective waits for comes ``delay_s`` later."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from distpatch import collectives, exchange


class Late:
    """A ``Work`` whose end is seen at ``due`` at the earliest."""

    def __init__(self, work: Any, due: float) -> None:
        self.work, self.due = work, due

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(self.due - time.perf_counter(), 0))


@contextlib.contextmanager
def delayed(delay_s: float) -> Iterator[None]:
    """Of messages, from when they are posted; of collectives, from when they are called."""

    def batch(ops: list[Any]) -> list[Late]:
        due = time.perf_counter() + delay_s
        return [Late(work, due) for work in dist.batch_isend_irecv(ops)]

    def collective(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            due = time.perf_counter() + delay_s
            getattr(dist, name)(*args, **kwargs)
            time.sleep(max(due - time.perf_counter(), 0))

        return call

    names = ("all_reduce", "all_gather_single")
    exchange.dist = SimpleNamespace(isend=dist.isend, irecv=dist.irecv, P2POp=dist.P2POp, batch_isend_irecv=batch)
    collectives.dist = SimpleNamespace(**{name: collective(name) for name in names})
    try:
        yield
    finally:
        exchange.dist = collectives.dist = dist
