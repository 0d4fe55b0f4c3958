"""Messages behind the computation: what one step sends is read in the next.

A step's exchanges are call sites, known by their order. Several in a row share their messages: one to and one
from each peer. A group's messages start when its last site has been passed, and are waited for where the next
step first reaches one of its sites, so that a site reads the rows of the step before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from distpatch.comm.communicator import Communicator
from distpatch.comm.transport import Batch, Works
from distpatch.torch_utils import private

ALIGNED_BYTES = 16  # of each site's part of a message: as large as any number
Key = tuple[object, ...]
Messages: TypeAlias = "list[tuple[int, Tensor]]"  # by peer


@dataclass
class Flat:
    """The messages to, or from, each peer: one flat buffer each, and every site's parts of them as views."""

    buffers: dict[int, Tensor]
    views: list[list[Tensor]]

    @staticmethod
    def of(sites: Sequence[Messages], device: torch.device) -> Flat:
        """Room for these messages; both ends of one compute the same places."""
        sizes: dict[int, int] = {}
        places: list[list[tuple[int, int, Tensor]]] = []
        for messages in sites:
            places.append([])
            for peer, tensor in messages:
                at = sizes.get(peer, 0)
                places[-1].append((peer, at, tensor))
                sizes[peer] = at + -(-tensor.numel() * tensor.element_size() // ALIGNED_BYTES) * ALIGNED_BYTES
        buffers = {peer: torch.zeros(size, dtype=torch.uint8, device=device) for peer, size in sizes.items()}
        views = [[_view(buffers[peer], at, like) for peer, at, like in site] for site in places]
        return Flat(buffers, views)


def _view(buffer: Tensor, at: int, like: Tensor) -> Tensor:
    return buffer[at : at + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


class SharedMessages:
    """The messages of some call sites in a row."""

    def __init__(
        self, background: Communicator, sends: Sequence[Messages], kept: Sequence[Messages], device: torch.device
    ) -> None:
        self.background, self.device = background, device
        self.outgoing, self.landing = Flat.of(sends, device), Flat.of(kept, device)
        for views, messages in zip(self.landing.views, kept, strict=True):
            _copy(views, _tensors(messages))
        self.works: Works | None = None
        self.started = 0.0

    def start(self) -> None:
        """Send what the sites have put into the buffers."""
        to, source = self.outgoing.buffers, self.landing.buffers
        self.background.recorder.record("displaced", "messages", 0, len(to))
        messages = (list(to), list(to.values()), list(source), list(source.values()))
        self.started = time.perf_counter()
        transport = self.background.transport(self.device)
        self.works = transport.post(Batch("displaced step", *messages, self.device))

    def wait(self) -> None:
        """Until the last messages that were started have gone and landed."""
        if self.works is None:
            return
        works, self.works = self.works, None
        asked = time.perf_counter()
        for work, _ in works:
            work.wait()
        self.background.recorder.waited("displaced step", asked - self.started, time.perf_counter() - asked)


class Site:
    """One call site: its place in its messages. ``own``: what this rank itself had there, where that is kept."""

    def __init__(self, key: Key, shared: SharedMessages, index: int, last: bool, own: Tensor | None) -> None:
        self.key, self.shared, self.last, self.own = key, shared, last, own
        self.outgoing, self.landing = shared.outgoing.views[index], shared.landing.views[index]
        self.sent_bytes = sum(view.nbytes for view in self.outgoing)

    def read(self, landing: Sequence[Tensor]) -> None:
        """What landed for the step before."""
        self.shared.wait()
        _copy(landing, self.landing)

    def write(self, op: str, outgoing: Sequence[Tensor]) -> None:
        """What the next step is to read; after ``read``."""
        self.shared.background.recorder.record("displaced", op, self.sent_bytes, 0)
        _copy(self.outgoing, outgoing)
        if self.last:
            self.shared.start()


class StepSchedule:
    """The call sites of a step, in their order: recorded in one step, read and written in those that follow.

    ``background``: the communicator of what runs behind the computation.
    """

    def __init__(self, background: Communicator, layers_per_message: int) -> None:
        self.background, self.layers_per_message = background, layers_per_message
        self.device = torch.device("cpu")
        self.sites: list[Site] = []
        self.shared: list[SharedMessages] = []
        self._open: list[tuple[Key, Messages, Messages, Tensor | None]] = []

    def record(self, key: Key, sends: Messages, recvs: Messages, own: Tensor | None = None) -> None:
        """A site that was passed just now; what it received is kept for the next step."""
        for tensor in _tensors(sends) + _tensors(recvs):
            self.device = tensor.device
        kept = [(peer, tensor.clone()) for peer, tensor in recvs]
        shapes = [(peer, torch.empty_like(tensor, device="meta")) for peer, tensor in sends]
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
            shared = SharedMessages(self.background, sends, kept, self.device)
        last = len(keys) - 1
        self.sites += [
            Site(key, shared, i, i == last, own) for i, (key, own) in enumerate(zip(keys, owns, strict=True))
        ]
        self.shared.append(shared)

    def drain(self) -> None:
        """Wait for all messages under way. Collective as they are: every rank has started the same ones."""
        for shared in self.shared:
            shared.wait()

    @property
    def buffer_bytes(self) -> int:
        flats = [flat for shared in self.shared for flat in (shared.outgoing, shared.landing)]
        return sum(buffer.numel() for flat in flats for buffer in flat.buffers.values())


def _tensors(messages: Messages) -> list[Tensor]:
    return [tensor for _, tensor in messages]


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if to:
        private.foreach_copy(list(to), list(source))
