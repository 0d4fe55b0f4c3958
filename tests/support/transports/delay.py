"""A transport on which everything takes longer: what a transfer or a collective waits for comes ``delay_s`` later."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from distpatch.comm.choose_transport import between, using
from distpatch.comm.transport import Batch, Layer, Transport, Work, Works
from tests.support.transports.staged import maybe


@dataclass
class Late:
    """A ``Work`` that ends at ``due`` at the earliest."""

    due: float
    work: Work

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(self.due - time.perf_counter(), 0))


@dataclass
class Landed:
    """What was received is not there before it was waited for."""

    to: list[Tensor]
    landed: list[Tensor]

    def wait(self) -> None:
        for place, message in zip(self.to, self.landed, strict=True):
            place.copy_(message)


class Delayed(Layer):
    """Messages take longer from when they are posted, collectives from when they are called."""

    def __init__(self, inner: Transport, delay_s: float) -> None:
        super().__init__(inner)
        self.delay_s = delay_s

    def post(self, batch: Batch) -> Works:
        due = time.perf_counter() + self.delay_s
        landing = [message.clone() for message in batch.landing]
        works = self.inner.post(replace(batch, landing=landing))
        return [*((Late(due, work), peer) for work, peer in works), (Landed(list(batch.landing), landing), None)]

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        with self._late():
            self.inner.all_reduce(tensor, op)

    def all_gather(self, tensor: Tensor, op: str) -> Tensor:
        with self._late():
            return self.inner.all_gather(tensor, op)

    @contextlib.contextmanager
    def _late(self) -> Iterator[None]:
        due = time.perf_counter() + self.delay_s
        yield
        time.sleep(max(due - time.perf_counter(), 0))


class Apart(Layer):
    """Halo rows do not come with a norm's moments."""

    def carries_rows(self) -> bool:
        return False


@contextlib.contextmanager
def delayed(delay_s: float, together: bool = True) -> Iterator[None]:
    """``together``: halo rows may come with the moments of a norm."""

    def slow(pg: dist.ProcessGroup, device: torch.device) -> Transport:
        transport: Transport = Delayed(between(pg, device), delay_s)
        return transport if together else Apart(transport)

    with using(maybe(slow)):
        yield
