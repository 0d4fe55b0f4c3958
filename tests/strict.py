"""A strict transport: a send ends only when its receive is posted, in order and of equal size.

So it is with NCCL, which hangs or mixes rows where two ranks disagree; gloo ends the whole process where
two sizes differ. Under ``rendezvous()`` the point-to-point messages of thread-ranks meet in memory
instead, and a mismatch or a missing partner is an error that names the ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from distpatch.transport import Batch, PointToPoint, Works, using
from tests.staged import maybe

Pair = tuple[str, int, int]  # (group name, from, to)


@dataclass
class Message:
    """One send or receive, which ends when its partner is posted; it is its own ``Work``."""

    meeting: Meeting
    is_send: bool
    tensor: Tensor
    group_name: str
    rank: int
    peer: int
    error: str = ""
    ended: bool = field(default=False, init=False)

    @property
    def pair(self) -> Pair:
        ends = (self.rank, self.peer) if self.is_send else (self.peer, self.rank)
        return (self.group_name, *ends)

    def __str__(self) -> str:
        verb = "send to" if self.is_send else "receive from"
        return f"rank {self.rank}'s {verb} rank {self.peer} ({self.tensor.nbytes} bytes)"

    def wait(self) -> None:
        self.meeting.wait(self)


class Meeting:
    """Where the ranks' messages meet: first posted, first matched, separately for every pair of ranks."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.changed = threading.Condition()
        self.waiting: dict[tuple[Pair, bool], deque[Message]] = defaultdict(deque)

    def start(self, batch: list[Message]) -> list[Message]:
        peers = [(message.peer, message.is_send) for message in batch]
        assert len(set(peers)) == len(peers), "NCCL has no tags: one message to a peer in a batch"
        with self.changed:
            for message in batch:
                partners = self.waiting[message.pair, not message.is_send]
                if partners:
                    self._meet(message, partners.popleft())
                else:
                    self.waiting[message.pair, message.is_send].append(message)
            self.changed.notify_all()
        return batch

    def _meet(self, one: Message, other: Message) -> None:
        sent, landing = (one, other) if one.is_send else (other, one)
        if (sent.tensor.shape, sent.tensor.dtype) == (landing.tensor.shape, landing.tensor.dtype):
            landing.tensor.copy_(sent.tensor)
        else:
            one.error = other.error = f"{sent} met {landing}"
        one.ended = other.ended = True

    def wait(self, message: Message) -> None:
        with self.changed:
            met = self.changed.wait_for(lambda: message.ended, self.timeout)
            if not met:
                pending = itertools.chain.from_iterable(self.waiting.values())
                raise RuntimeError(f"no partner within {self.timeout:g} s: {', '.join(map(str, pending))}")
        if message.error:
            raise RuntimeError(message.error)


class Strict(PointToPoint):
    """Messages meet in memory; collectives are the group's own."""

    def __init__(self, meeting: Meeting, pg: dist.ProcessGroup) -> None:
        super().__init__(pg)
        self.meeting = meeting
        self.ends = pg.group_name, pg.rank()

    def start(self, batch: Batch) -> Works:
        assert all(tensor.is_contiguous() and tensor.ndim == 1 for tensor in (*batch.landing, *batch.outgoing))
        ends = [(False, *end) for end in zip(batch.landing, batch.source, strict=True)]
        ends += [(True, *end) for end in zip(batch.outgoing, batch.to, strict=True)]
        messages = [Message(self.meeting, sends, t.detach(), *self.ends, peer) for sends, t, peer in ends]
        return [(message, message.peer) for message in self.meeting.start(messages)]


@contextlib.contextmanager
def rendezvous(timeout: float = 10.0) -> Iterator[None]:
    """Rows move over the strict transport while the context is open."""
    meeting = Meeting(timeout)
    with using(maybe(lambda pg, device: Strict(meeting, pg))):
        yield
