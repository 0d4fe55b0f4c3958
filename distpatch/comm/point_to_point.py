"""The process group's own messages and collectives."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from distpatch.comm import process_groups
from distpatch.comm.transport import Batch, Transport, Works
from distpatch.torch_utils import private

# What gloo and NCCL take alike, and in what the rest is added; it travels as bytes.
ADDED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8})
ADDED |= {torch.int32, torch.int64}
WIDER = {torch.int16: torch.int32, torch.uint16: torch.int32, torch.uint32: torch.int64, torch.bool: torch.int32}
CPU = torch.device("cpu")


class PointToPoint(Transport):
    """The process group's own messages and collectives."""

    def __init__(self, pg: dist.ProcessGroup, device: torch.device = CPU) -> None:
        self._pg = weakref.ref(pg)  # torch keeps it while it is open
        self.device = device
        self.lands_later = device.type == "cuda"
        self._collects: bool | None = None  # whether the backend sends a batch at once, as NCCL

    @property
    def pg(self) -> dist.ProcessGroup:
        pg = self._pg()
        if pg is None:
            raise RuntimeError("the process group is closed")
        return pg

    def post(self, batch: Batch) -> Works:
        if not batch.to and not batch.source:
            return []
        pg = self.pg
        if self._collects is None:
            self._collects = private.collects_batches(pg, batch.device)
        try:
            works = send_batch(pg, batch, self._collects)
        except BaseException:
            _end_batch(pg, batch.device)
            raise
        return works

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        if tensor.dtype == torch.uint64:
            tensor = tensor.view(torch.int64)  # of which the sum has the same bits
        if tensor.dtype in ADDED or tensor.is_complex():
            dist.all_reduce(tensor, group=self.pg)
            return
        wider = tensor.to(WIDER.get(tensor.dtype, torch.float32))
        dist.all_reduce(wider, group=self.pg)
        tensor.copy_(wider)

    def all_gather(self, tensor: Tensor, op: str) -> Tensor:
        pg = self.pg
        everyone = tensor.new_empty((pg.size(), *tensor.shape))
        private.all_gather(_as_sent(everyone.view(-1)), _as_sent(tensor.view(-1)), pg)
        return everyone

    def abort(self) -> None:
        if (pg := self._pg()) is not None:
            process_groups.abort(pg)

    def finish(self) -> Iterator[None]:
        if not self.lands_later:
            return
        landed = torch.cuda.Event()
        landed.record(torch.cuda.current_stream(self.device))
        while not landed.query():
            yield


def send_batch(pg: dist.ProcessGroup, batch: Batch, collects: bool) -> Works:
    """What ``dist.batch_isend_irecv`` does, whose checks take longer than the rest of an exchange."""
    if collects:
        private.begin_batch(pg, batch.device)
    works: Works = [(pg.recv([_as_sent(t)], peer, 0), peer) for peer, t in zip(batch.source, batch.landing)]
    works += [(pg.send([_as_sent(t)], peer, 0), peer) for peer, t in zip(batch.to, batch.outgoing)]
    if not collects:
        return works
    peers = {peer for _, peer in works}
    return [(private.end_batch(pg, batch.device), peers.pop() if len(peers) == 1 else None)]


def _as_sent(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in ADDED else as_bytes(tensor)


def _end_batch(pg: dist.ProcessGroup, device: torch.device = CPU) -> None:
    """End what an exception inside a batch left open, and what of it is under way.

    Else NCCL's next calls in this thread, of any group, would be queued and never run.
    """
    backend = private.backend_of(pg, device)
    if backend.supports_coalescing:
        for end in (partial(private.end_batch, pg, device), backend.abort):
            with contextlib.suppress(Exception):  # the first one is what is told
                end()


def as_bytes(tensor: Tensor) -> Tensor:
    """A flat, contiguous tensor as it stands in memory: NCCL and gloo each lack some dtypes."""
    if tensor.stride(0) != 1:  # of one element or none, the stride may be any
        tensor = tensor.as_strided(tensor.shape, (1,))
    return tensor.view(torch.uint8)
