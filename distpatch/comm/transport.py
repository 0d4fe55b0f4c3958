"""How tensors travel between the ranks of a group: one interface, which all ways have.

A new way is one class, and one line where it is chosen: in ``choose_transport.between`` for what some groups or
devices need, ``choose_transport.using`` for all groups of the process, ``Communicator.use`` for one group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Messages that go at once, at most one to and one from each other rank of the group.

    ``outgoing[i]`` goes to rank ``to[i]``, ``landing[i]`` is filled by rank ``source[i]``: flat, contiguous tensors
    on ``device``; ``op``: whose they are, for errors and records. ``key``: what all ranks know of the batch, to tell
    one call site from another, where ``landing`` may be filled with what the same site sent earlier; else None.
    """

    op: str
    to: Sequence[int]
    outgoing: Sequence[Tensor]
    source: Sequence[int]
    landing: Sequence[Tensor]
    device: torch.device
    key: tuple[Any, ...] | None = None

    @property
    def sent_bytes(self) -> int:
        return sum(message.numel() * message.element_size() for message in self.outgoing)


class Work(Protocol):
    """Something under way."""

    def wait(self) -> object:
        """Until it has ended; on a GPU for the stream that is current, the host does not wait."""


Works: TypeAlias = "list[tuple[Work, int | None]]"  # each with the rank it waits for, None where that is not known
Finish = Callable[[], None]  # waits for what was begun
Moments: TypeAlias = "tuple[Sequence[int], Tensor]"  # how many samples; mean and deviation, (K, 2, ...)


class Transport(ABC):
    """One rank's end of a group. Every rank of the group makes the same calls in the same order.

    ``op``: the operation that asked for a call, for errors and records. What fails raises ``RuntimeError``; which
    rank was waited for is told by ``Watched``. ``lands_later``: a wait may end before all has landed, as a GPU's do.
    """

    lands_later: bool = False

    def open(self, device: torch.device) -> None:
        """Make the connections for tensors of this device."""
        self.all_reduce(torch.zeros(1, device=device), "set-up")

    @abstractmethod
    def post(self, batch: Batch) -> Works:
        """Send and receive; returns at once. The tensors are left alone until all works were waited for, in order."""

    def exchange(self, batch: Batch) -> None:
        """Send and receive; returns when all has landed (on a GPU: for the stream that computes)."""
        self.begin(batch)()

    def begin(self, batch: Batch) -> Finish:
        """Send and receive behind what is computed until the result is called, which returns when all has landed.

        The tensors are left alone until then, and nothing else is sent.
        """
        works = self.post(batch)

        def finish() -> None:
            for work, _ in works:
                work.wait()

        return finish

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: str) -> None:
        """Put every rank's sum in the place of a contiguous tensor, bit-identical on all; of bools: whether any is."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, op: str) -> Tensor:
        """Every rank's contiguous tensor, (ranks, *shape): all have the same shape."""

    def known_moments(self, counts: Sequence[int], own: Tensor, op: str) -> Moments | None:
        """Moments to normalise with that need not be gathered from all ranks now; None: gather them.

        ``counts``: how many samples each rank has; ``own``: mean and deviation of this rank's, (2, ...).
        """
        return None

    def carries_rows(self) -> bool:
        """Whether halo rows may come with the moments of a norm: not where those of an earlier step serve."""
        return True

    def background_problem(self) -> str:
        """Why ``post`` cannot run behind the computation, or nothing."""
        return ""

    def abort(self) -> None:
        """End all that this rank has under way, in whichever thread; what the others wait for from it fails.

        Nothing can be sent afterwards. On a GPU waits may end as if all had landed, whatever has.
        """
        return None

    def finish(self) -> Iterator[None]:
        """Wait, with pauses in which the caller may give up, until all that was waited for has really landed.

        A wait that ends for a GPU's stream alone says nothing of that.
        """
        yield from ()


class Layer(Transport):
    """A transport on top of another: what it does not change goes through as it is."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.lands_later = inner, inner.lands_later

    def post(self, batch: Batch) -> Works:
        return self.inner.post(batch)

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        self.inner.all_reduce(tensor, op)

    def all_gather(self, tensor: Tensor, op: str) -> Tensor:
        return self.inner.all_gather(tensor, op)

    def known_moments(self, counts: Sequence[int], own: Tensor, op: str) -> Moments | None:
        return self.inner.known_moments(counts, own, op)

    def carries_rows(self) -> bool:
        return self.inner.carries_rows()

    def background_problem(self) -> str:
        return self.inner.background_problem()

    def abort(self) -> None:
        self.inner.abort()

    def finish(self) -> Iterator[None]:
        return self.inner.finish()


AddLayer = Callable[[Transport], Transport]  # a transport, with a layer on top
