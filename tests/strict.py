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
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from distpatch import exchange

Pair = tuple[str, int, int]  # (group name, from, to)


@dataclass
class Message:
    """One send or receive, which ends when its partner is posted; it is its own ``Work``."""

    meeting: Meeting
    is_send: bool
    tensor: Tensor
    group: dist.ProcessGroup
    group_peer: int
    error: str = ""
    ended: bool = field(default=False, init=False)

    @property
    def pair(self) -> Pair:
        rank = self.group.rank()
        ends = (rank, self.group_peer) if self.is_send else (self.group_peer, rank)
        return (self.group.group_name, *ends)

    def __str__(self) -> str:
        verb = "send to" if self.is_send else "receive from"
        return f"rank {self.group.rank()}'s {verb} rank {self.group_peer} ({self.tensor.nbytes} bytes)"

    def wait(self) -> None:
        self.meeting.wait(self)


class Meeting:
    """Where the ranks' messages meet: first posted, first matched, separately for every pair of ranks."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.changed = threading.Condition()
        self.waiting: dict[tuple[Pair, bool], deque[Message]] = defaultdict(deque)

    def start(self, batch: list[Message]) -> list[Message]:
        peers = [(message.group_peer, message.is_send) for message in batch]
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


@contextlib.contextmanager
def rendezvous(timeout: float = 10.0) -> Iterator[None]:
    """Rows move over the strict transport while the context is open."""
    meeting = Meeting(timeout)

    def p2p_op(op: Any, tensor: Tensor, group: dist.ProcessGroup, group_peer: int) -> Message:
        assert tensor.is_contiguous() and tensor.ndim == 1
        return Message(meeting, op is dist.isend, tensor.detach(), group, group_peer)

    transport = SimpleNamespace(isend=dist.isend, irecv=dist.irecv, P2POp=p2p_op, batch_isend_irecv=meeting.start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "dist", transport)
        yield
