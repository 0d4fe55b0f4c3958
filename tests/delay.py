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
    """A ``Work`` that ends at ``due`` at the earliest; what it receives is not there before it was waited for."""

    def __init__(self, op: Any, due: float) -> None:
        self.due, self.to, self.tensor = due, op.tensor, op.tensor
        if op.op is dist.irecv:
            self.tensor = op.tensor = op.tensor.clone()
        self.work: Any = None

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(self.due - time.perf_counter(), 0))
        if self.tensor is not self.to:
            self.to.copy_(self.tensor)


@contextlib.contextmanager
def delayed(delay_s: float) -> Iterator[None]:
    """Of messages, from when they are posted; of collectives, from when they are called."""

    def batch(ops: list[Any]) -> list[Late]:
        due = time.perf_counter() + delay_s
        late = [Late(op, due) for op in ops]
        for one, work in zip(late, dist.batch_isend_irecv(ops), strict=True):
            one.work = work
        return late

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
