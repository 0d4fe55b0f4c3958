"""A transport in memory between thread-ranks that is as asynchronous as NCCL may be, on CPUs and on one GPU.

A send ends when its receive is posted, in order and of equal size: what does not match is an error that names both.
What gloo hides shows here as wrong numbers: rows that are read before they were waited for, sent rows that are
written to too early, memory that is used again under a transfer.

On CPUs a message is delivered when it is waited for, and not before: where it lands is filled with NaN (all bits set)
when it is posted and holds its rows after the receiver's ``wait``; what is sent is read at the first ``wait`` of
either end. On CUDA a copy on a side stream of the receiver's does the same, behind a delay on the device; ``wait``
makes the stream that computes wait for an event, as NCCL's does, and tensors are recorded on the side stream.

Uses torch alone, so that ``benchmarks/gpu`` can run it where there are no test tools.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distpatch.comm.choose_transport import using
from distpatch.comm.transport import Batch, Transport, Works
from tests.support.transports.staged import maybe

CYCLES_PER_SECOND = 1.5e9  # of a GPU, about: ``torch.cuda._sleep`` counts cycles


@dataclass(eq=False)
class Message:
    """One send or receive; it is its own ``Work``. ``ready``, ``done``: on CUDA, events of the tensor and the copy."""

    hub: Late
    is_send: bool
    tensor: Tensor
    group: str
    rank: int
    peer: int
    partner: Message | None = None
    error: str = ""
    read: Tensor | None = None
    ready: Any = None
    done: Any = None

    @property
    def pair(self) -> tuple[str, int, int]:
        ends = (self.rank, self.peer) if self.is_send else (self.peer, self.rank)
        return (self.group, *ends)

    def __str__(self) -> str:
        verb = "send to" if self.is_send else "receive from"
        return f"rank {self.rank}'s {verb} rank {self.peer} ({self.tensor.nbytes} bytes)"

    def wait(self, *_: Any) -> None:
        self.hub.wait(self)


@dataclass
class Collective:
    """What the ranks brought to one collective, with the events after which it is there."""

    parts: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)


class Late:
    """Where the ranks' messages meet: first posted, first matched, separately for every pair of ranks.

    ``delay_s``: every wait takes up to so much longer, at random. Between ``begin`` and ``end`` ranks compute one at a
    time, each until it waits for another: ``turn_ms`` is then what each would take with a device of its own.
    """

    def __init__(self, *, delay_s: float = 0.0, timeout_s: float = 30.0, seed: int = 0) -> None:
        self.delay_s, self.timeout_s, self.seed = delay_s, timeout_s, seed
        self.changed = threading.Condition()
        self.waiting: dict[Any, deque[Message]] = defaultdict(deque)
        self.collectives: dict[Any, Collective] = defaultdict(Collective)
        self.calls: dict[Any, int] = defaultdict(int)
        self.messages = 0
        self.turn = threading.Lock()
        self.turn_ms: dict[int, float] = defaultdict(float)
        self.here = threading.local()

    # Point to point.

    def post(self, batch: list[Message]) -> list[Message]:
        for message in batch:
            if message.tensor.is_cuda:
                message.ready = torch.cuda.current_stream().record_event()
            elif not message.is_send:
                _spoil(message.tensor)
        peers = [(message.peer, message.is_send) for message in batch]
        assert len(set(peers)) == len(peers), "NCCL has no tags: one message to a peer in a batch"
        with self.changed:
            for message in batch:
                self.messages += 1
                partners = self.waiting[message.pair, not message.is_send]
                if partners:
                    self._meet(message, partners.popleft())
                else:
                    self.waiting[message.pair, message.is_send].append(message)
            self.changed.notify_all()
        return batch

    def _meet(self, one: Message, other: Message) -> None:
        one.partner, other.partner = other, one
        sent, landing = (one, other) if one.is_send else (other, one)
        if (sent.tensor.numel(), sent.tensor.dtype) != (landing.tensor.numel(), landing.tensor.dtype):
            one.error = other.error = f"{sent} met {landing}"
        elif landing.tensor.is_cuda:
            one.done = other.done = self._copy_behind(sent, landing)

    def _copy_behind(self, sent: Message, landing: Message) -> Any:
        """On CUDA: a copy on a stream that nothing else waits for; the event of its end."""
        side = torch.cuda.Stream(landing.tensor.device)
        cycles = int(self._draw() * CYCLES_PER_SECOND)
        with torch.cuda.stream(side):
            side.wait_event(landing.ready)
            _spoil(landing.tensor)
            side.wait_event(sent.ready)
            if cycles:
                torch.cuda._sleep(cycles)
            with torch.inference_mode():
                landing.tensor.copy_(sent.tensor)
            done = side.record_event()
        for message in (sent, landing):
            message.tensor.record_stream(side)
        return done

    def wait(self, message: Message) -> None:
        with self._paused(lambda: message.partner is not None), self.changed:
            if not self.changed.wait_for(lambda: message.partner is not None, self.timeout_s):
                pending = itertools.chain.from_iterable(self.waiting.values())
                raise RuntimeError(f"timed out: no partner within {self.timeout_s:g} s: {', '.join(map(str, pending))}")
        if message.error:
            raise RuntimeError(message.error)
        partner = message.partner
        assert partner is not None
        if message.done is not None:
            torch.cuda.current_stream().wait_event(message.done)
            return
        if self.delay_s:
            time.sleep(self._draw())
        sent, landing = (message, partner) if message.is_send else (partner, message)
        with self.changed, torch.inference_mode():
            if landing.read is None:
                landing.read = sent.tensor.clone()
            if message is landing:
                landing.tensor.copy_(landing.read)

    def _draw(self) -> float:
        return random.Random(f"{self.seed} {self.messages} {threading.get_ident()}").uniform(0, self.delay_s)

    # Collectives run on the stream that computes: nothing of them is behind it.

    def everyone(self, mine: Tensor, group: str, rank: int, size: int) -> list[Tensor]:
        """A copy of every rank's tensor, in rank order."""
        with torch.inference_mode():
            own = mine.clone()
        ready = torch.cuda.current_stream().record_event() if mine.is_cuda else None
        with self.changed:
            count = self.calls[group, rank] = self.calls[group, rank] + 1
            meeting = self.collectives[group, count]
            meeting.parts[rank] = (own, ready)
            self.changed.notify_all()
        with self._paused(lambda: len(meeting.parts) == size), self.changed:
            if not self.changed.wait_for(lambda: len(meeting.parts) == size, self.timeout_s):
                missing = sorted(set(range(size)) - set(meeting.parts))
                raise RuntimeError(
                    f"rank(s) {missing} did not come to a collective within {self.timeout_s:g} s (timed out)"
                )
            self.collectives.pop((group, count), None)
        kinds = [f"rank {r}'s {tuple(part.shape)} of {part.dtype}" for r, (part, _) in sorted(meeting.parts.items())]
        if len({kind.partition("'s ")[2] for kind in kinds}) > 1:
            raise RuntimeError(f"a collective of different tensors: {', '.join(kinds)}")
        if self.delay_s and ready is None:
            time.sleep(self._draw())
        for part, there in meeting.parts.values():
            if there is not None:
                torch.cuda.current_stream().wait_event(there)
                part.record_stream(torch.cuda.current_stream())
        return [meeting.parts[r][0] for r in range(size)]

    # Turns.

    def begin(self, rank: int, device: torch.device) -> None:
        """From here on this rank computes, in turn with the others; between this and ``end`` it waits for them only
        in transfers."""
        self.here.rank, self.here.device = rank, device
        self._resume()

    def end(self) -> None:
        """The end of what began with ``begin``."""
        self._pause()
        del self.here.rank

    @contextlib.contextmanager
    def _paused(self, is_there: Callable[[], bool]) -> Iterator[None]:
        if not hasattr(self.here, "rank") or is_there():
            yield
            return
        self._pause()
        try:
            yield
        finally:
            self._resume()

    def _resume(self) -> None:
        self.turn.acquire()
        _finish(self.here.device)
        self.here.start = time.perf_counter()

    def _pause(self) -> None:
        _finish(self.here.device)
        self.turn_ms[self.here.rank] += 1e3 * (time.perf_counter() - self.here.start)
        self.turn.release()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spoil(tensor: Tensor) -> None:
    """All bits set: NaN, where it is a floating-point number."""
    with torch.inference_mode():
        tensor.view(-1).view(torch.uint8).fill_(0xFF)


class End(Transport):
    """One rank's end of a group."""

    def __init__(self, hub: Late, pg: dist.ProcessGroup) -> None:
        self.hub, self.group, self.rank, self.size = hub, pg.group_name, pg.rank(), pg.size()

    def post(self, batch: Batch) -> Works:
        peers = [*batch.source, *batch.to]
        tensors = [*batch.landing, *batch.outgoing]
        assert all(t.is_contiguous() and t.ndim == 1 for t in tensors)
        messages = [
            Message(self.hub, i >= len(batch.source), t.detach(), self.group, self.rank, peer)
            for i, (t, peer) in enumerate(zip(tensors, peers, strict=True))
        ]
        return list(zip(self.hub.post(messages), peers, strict=True))

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        parts = self.hub.everyone(tensor, self.group, self.rank, self.size)
        with torch.inference_mode():
            total = parts[0]
            for part in parts[1:]:
                total = total | part if tensor.dtype == torch.bool else total + part
            tensor.copy_(total)

    def all_gather(self, tensor: Tensor, op: str) -> Tensor:
        everyone = tensor.new_empty((self.size, *tensor.shape))
        parts = self.hub.everyone(tensor, self.group, self.rank, self.size)
        with torch.inference_mode():
            torch.stack(parts, out=everyone)
        return everyone


@contextlib.contextmanager
def late(hub: Late | None = None, **options: Any) -> Iterator[Late]:
    """Rows and collectives of thread-ranks move over this transport while the context is open."""
    hub = hub or Late(**options)
    with using(maybe(lambda pg, device: End(hub, pg))):
        yield hub
