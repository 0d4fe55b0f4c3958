"""How tensors travel between the ranks of a group: one interface, and the ways there are.

``between`` chooses; ``using`` puts another in its place, for all groups of this process (tests do).
"""

from __future__ import annotations

import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from distpatch.errors import RankError
from distpatch.torch_utils import private

# What gloo and NCCL add alike, and in what the rest is added. Messages travel as bytes, whatever they are.
ADDED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8})
ADDED |= {torch.int32, torch.int64}
WIDER = {torch.int16: torch.int32, torch.uint16: torch.int32, torch.uint32: torch.int64, torch.bool: torch.int32}


@dataclass(frozen=True)
class Batch:
    """Messages that go at once, at most one to and one from each other rank of the group.

    ``outgoing[i]`` goes to rank ``to[i]``, ``landing[i]`` is filled by rank ``source[i]``: flat, contiguous tensors
    on ``device``; ``op``: whose they are, for errors and records.
    """

    op: str
    to: Sequence[int]
    outgoing: Sequence[Tensor]
    source: Sequence[int]
    landing: Sequence[Tensor]
    device: torch.device

    @property
    def empty(self) -> bool:
        return not self.to and not self.source

    @property
    def sent_bytes(self) -> int:
        return sum(message.numel() * message.element_size() for message in self.outgoing)


class Work(Protocol):
    """Something under way."""

    def wait(self) -> object:
        """Until it has ended; on a GPU for the stream that is current, the host does not wait."""


Works: TypeAlias = "list[tuple[Work, int | None]]"  # each with the rank it waits for, None where that is not known


class Transport(ABC):
    """One rank's end of a group. What fails raises ``RuntimeError``; who is to blame is told by the caller."""

    collective = False  # every rank of the group starts every batch, also one that is empty on it

    def open(self, device: torch.device) -> None:
        """Make the connections for tensors of this device; every rank of the group calls it."""
        self.all_reduce(torch.zeros(1, device=device))

    @abstractmethod
    def start(self, batch: Batch) -> Works:
        """Send and receive; returns at once. The tensors are left alone until all works were waited for, in order."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> None:
        """Put every rank's sum in the place of a contiguous tensor, bit-identical on all; of bools: whether any is."""

    @abstractmethod
    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's contiguous tensor, (ranks, *shape): all have the same shape."""


class PointToPoint(Transport):
    """The process group's own messages and collectives."""

    def __init__(self, pg: dist.ProcessGroup) -> None:
        self._pg = weakref.ref(pg)  # torch keeps it while it is open

    @property
    def pg(self) -> dist.ProcessGroup:
        pg = self._pg()
        if pg is None:
            raise RuntimeError("the process group is closed")
        return pg

    def start(self, batch: Batch) -> Works:
        if batch.empty:
            return []
        pg, peers = self.pg, [*batch.source, *batch.to]
        ops = [
            *(dist.P2POp(dist.irecv, as_bytes(t), group=pg, group_peer=p) for p, t in zip(batch.source, batch.landing)),
            *(dist.P2POp(dist.isend, as_bytes(t), group=pg, group_peer=p) for p, t in zip(batch.to, batch.outgoing)),
        ]
        try:
            works = dist.batch_isend_irecv(ops)
        except BaseException:
            _end_batch(pg, batch.device)
            raise
        named: Sequence[int | None] = peers if len(works) == len(peers) else [None] * len(works)
        return list(zip(works, named, strict=True))

    def all_reduce(self, tensor: Tensor) -> None:
        if tensor.dtype == torch.uint64:
            tensor = tensor.view(torch.int64)  # of which the sum has the same bits
        if tensor.dtype in ADDED or tensor.is_complex():
            dist.all_reduce(tensor, group=self.pg)
            return
        wider = tensor.to(WIDER.get(tensor.dtype, torch.float32))
        dist.all_reduce(wider, group=self.pg)
        tensor.copy_(wider)

    def all_gather(self, tensor: Tensor) -> Tensor:
        pg = self.pg
        everyone = tensor.new_empty((pg.size(), *tensor.shape))
        private.all_gather(as_bytes(everyone.view(-1)), as_bytes(tensor.view(-1)), pg)
        return everyone


def _end_batch(pg: dist.ProcessGroup, device: torch.device) -> None:
    """End what an exception inside a batch left open, and what of it is under way.

    torch does not: the thread's next calls of this group would return and do nothing, and NCCL's of any group
    would be queued and never run.
    """
    private.forget_batch(pg)
    backend = pg._get_backend(device)
    if backend.supports_coalescing:
        for end in (partial(pg._end_coalescing, device), backend.abort):
            with contextlib.suppress(Exception):  # the first one is what is told
                end()


class Staged(Transport):
    """Through the CPU's memory, for a device whose tensors ``inner`` cannot take."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.collective = inner, inner.collective

    def start(self, batch: Batch) -> Works:
        outgoing = [_on_host(message) for message in batch.outgoing]
        landing = [_room_on_host(message) for message in batch.landing]
        works = self.inner.start(replace(batch, outgoing=outgoing, landing=landing, device=torch.device("cpu")))
        return [*works, (_Back(batch.landing, landing), None)] if landing else works

    def all_reduce(self, tensor: Tensor) -> None:
        host = _on_host(tensor)
        self.inner.all_reduce(host)
        tensor.copy_(host, non_blocking=True)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.inner.all_gather(_on_host(tensor)).to(tensor.device, copy=True)


@dataclass(frozen=True)
class _Back:
    """What has landed on the host, on its way to where it belongs."""

    to: Sequence[Tensor]
    landed: Sequence[Tensor]

    def wait(self) -> None:
        for place, message in zip(self.to, self.landed, strict=True):
            place.copy_(message, non_blocking=True)


def _room_on_host(like: Tensor) -> Tensor:
    """Memory of the CPU that a GPU copies to and from at full speed."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.device.type == "cuda")


def _on_host(tensor: Tensor) -> Tensor:
    return _room_on_host(tensor).copy_(tensor)  # blocks: what follows on the host reads it


def as_bytes(tensor: Tensor) -> Tensor:
    """A flat, contiguous tensor as it stands in memory: NCCL and gloo each lack some dtypes."""
    if tensor.stride(0) != 1:  # of one element or none, the stride may be any
        tensor = tensor.as_strided(tensor.shape, (1,))
    return tensor.view(torch.uint8)


def between(pg: dist.ProcessGroup, device: torch.device) -> Transport:
    """How tensors of this device travel in a group: gloo takes those of the CPU alone.

    Raises ``RankError`` where the group has no backend for them, and none for the CPU that they can go by.
    """
    direct = PointToPoint(pg)
    if backend_name(pg, device) not in ("" if device.type == "cpu" else "gloo", ""):
        return direct
    if device.type != "cpu" and backend_name(pg, torch.device("cpu")):
        return Staged(direct)
    raise RankError(
        f"the group has no backend for tensors of {device} (it has {', '.join(map(str, pg._device_types))}): move the "
        "model and its arguments to one of these, or make the group with a backend for both "
        '(dist.init_process_group("cpu:gloo,cuda:nccl"))'
    )


def backend_name(pg: dist.ProcessGroup, device: torch.device) -> str:
    """Such as "nccl", or nothing where the group has no backend for this kind of device."""
    try:
        backend: Any = pg._get_backend(torch.device(device.type))
    except RuntimeError:
        return ""
    while hasattr(backend, "wrapped_pg"):  # TORCH_DISTRIBUTED_DEBUG=DETAIL
        backend = backend.wrapped_pg
    return str(backend.name())


Factory = Callable[[dist.ProcessGroup, torch.device], Transport]
_factory: list[Factory] = [between]  # the last one counts


def factory() -> Factory:
    """What makes the transport of a group and a device."""
    return _factory[-1]


@contextlib.contextmanager
def using(make: Factory) -> Iterator[None]:
    """All groups of this process, in all threads, move their tensors by what ``make`` returns for group and device.

    It is asked once for each group and device. A transport keeps no strong reference to the group.
    """
    _factory.append(make)
    try:
        yield
    finally:
        _factory.remove(make)
