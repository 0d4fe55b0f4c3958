"""Messages behind the computation: what one step sends is read in the next.

A step's exchanges are call sites, known by their order. Several in a row share their messages: one to and one
from each peer. A group's messages start when its last site has been passed, and are waited for where the next
step first reaches one of its sites, so that a site reads the rows of the step before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distpatch.comm.communicator import Communicator, Parts
from distpatch.comm.row_exchange import Transfer, start
from distpatch.comm.transport import Batch as Messages

ALIGNED_BYTES = 16  # of each part of a message: as large as any number
Key = tuple[object, ...]


@dataclass
class Flat:
    """The messages to, or from, each peer: one flat buffer each, and every site's parts of them as views."""

    buffers: dict[int, Tensor]
    views: list[list[Tensor]]

    @staticmethod
    def of(sites: Sequence[Parts], device: torch.device) -> Flat:
        """Room for these parts; both ends of a message compute the same places."""
        sizes: dict[int, int] = {}
        places: list[list[tuple[int, int, Tensor]]] = []
        for parts in sites:
            places.append([])
            for peer, tensors in parts:
                for tensor in tensors:
                    at = sizes.get(peer, 0)
                    places[-1].append((peer, at, tensor))
                    sizes[peer] = at + -(-tensor.numel() * tensor.element_size() // ALIGNED_BYTES) * ALIGNED_BYTES
        buffers = {peer: torch.zeros(size, dtype=torch.uint8, device=device) for peer, size in sizes.items()}
        views = [[_view(buffers[peer], at, like) for peer, at, like in site] for site in places]
        return Flat(buffers, views)


def _view(buffer: Tensor, at: int, like: Tensor) -> Tensor:
    return buffer[at : at + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


class Batch:
    """Call sites that share their messages."""

    def __init__(
        self, async_comm: Communicator, sends: Sequence[Parts], kept: Sequence[Parts], device: torch.device
    ) -> None:
        self.async_comm, self.device = async_comm, device
        self.outgoing, self.landing = Flat.of(sends, device), Flat.of(kept, device)
        for views, parts in zip(self.landing.views, kept, strict=True):
            _copy(views, _tensors(parts))
        self.under_way: Transfer | None = None

    def start(self) -> None:
        """Send what the sites have put into the buffers."""
        to, source = self.outgoing.buffers, self.landing.buffers
        self.async_comm.recorder.record("displaced", "messages", 0, len(to))
        messages = (list(to), list(to.values()), list(source), list(source.values()))
        self.under_way = start(self.async_comm, Messages("displaced step", *messages, self.device))

    def wait(self) -> None:
        """Until the last messages that were started have gone and landed."""
        if self.under_way is None:
            return
        under_way, self.under_way = self.under_way, None
        asked = time.perf_counter()
        under_way.wait()
        self.async_comm.recorder.waited("displaced step", asked - under_way.started, time.perf_counter() - asked)


class Site:
    """One call site: its place in its batch. ``own``: what this rank itself had there, where that is kept."""

    def __init__(self, key: Key, batch: Batch, index: int, last: bool, own: Tensor | None) -> None:
        self.key, self.batch, self.last, self.own = key, batch, last, own
        self.outgoing, self.landing = batch.outgoing.views[index], batch.landing.views[index]
        self.sent_bytes = sum(view.numel() * view.element_size() for view in self.outgoing)

    def read(self, recvs: Parts) -> None:
        """What landed for the step before."""
        self.batch.wait()
        _copy(_tensors(recvs), self.landing)

    def write(self, op: str, sends: Parts) -> None:
        """What the next step is to read; after ``read``."""
        self.batch.async_comm.recorder.record("displaced", op, self.sent_bytes, 0)
        _copy(self.outgoing, _tensors(sends))
        if self.last:
            self.batch.start()


class Plan:
    """The call sites of a step, in their order: recorded in one step, read and written in those that follow."""

    def __init__(self, async_comm: Communicator, layers_per_message: int) -> None:
        self.async_comm, self.layers_per_message = async_comm, layers_per_message
        self.device = torch.device("cpu")
        self.sites: list[Site] = []
        self.batches: list[Batch] = []
        self._open: list[tuple[Key, Parts, Parts, Tensor | None]] = []

    def record(self, key: Key, sends: Parts, recvs: Parts, own: Tensor | None = None) -> None:
        """A site that was passed just now; what it received is kept for the next step."""
        for tensor in _tensors(sends) + _tensors(recvs):
            self.device = tensor.device
        kept = [(peer, [tensor.clone() for tensor in tensors]) for peer, tensors in recvs]
        shapes = [(peer, [torch.empty_like(t, device="meta") for t in tensors]) for peer, tensors in sends]
        self._open.append((key, shapes, kept, own))
        if len(self._open) == self.layers_per_message:
            self.close()

    def close(self) -> None:
        """No more sites for the last messages."""
        if not self._open:
            return
        keys, sends, kept, owns = zip(*self._open, strict=True)
        self._open = []
        with torch.inference_mode(False), torch.no_grad():  # buffers that a step outside of it may write to, too
            batch = Batch(self.async_comm, sends, kept, self.device)
        last = len(keys) - 1
        self.sites += [Site(key, batch, i, i == last, own) for i, (key, own) in enumerate(zip(keys, owns, strict=True))]
        self.batches.append(batch)

    def drain(self) -> None:
        """Wait for all messages under way. Collective as they are: every rank has started the same ones."""
        for batch in self.batches:
            batch.wait()

    @property
    def buffer_bytes(self) -> int:
        flats = [flat for batch in self.batches for flat in (batch.outgoing, batch.landing)]
        return sum(buffer.numel() for flat in flats for buffer in flat.buffers.values())


def _tensors(parts: Parts) -> list[Tensor]:
    return [tensor for _, tensors in parts for tensor in tensors]


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)
