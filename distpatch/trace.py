"""What a run sent and which operations it gathered: counted where it happens, read by ``trace()``."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Record:
    """One exchange or collective of this rank.

    ``kind`` is ``"p2p"`` or the collective's name, ``op`` the operation that asked for it; bytes are
    those that this rank sent.
    """

    kind: str
    op: str
    sent_bytes: int
    messages: int


@dataclass(frozen=True)
class Wait:
    """One wait for messages that ran behind the computation.

    ``behind_s``: seconds from their start to the wait; ``blocked_s``: how long the wait then took. On a GPU both
    are the host's time.
    """

    op: str
    behind_s: float
    blocked_s: float


@dataclass
class Fallback:
    """An operation without a sharded rule: gathered, computed on every rank, sharded again."""

    op: str
    shapes: str
    where: str
    count: int = 0
    bytes: int = 0


@dataclass(eq=False)
class Trace:
    """Everything recorded on this rank while the trace was open."""

    records: list[Record] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)

    @property
    def sent_bytes(self) -> int:
        return sum(record.sent_bytes for record in self.records)

    @property
    def messages(self) -> int:
        return sum(record.messages for record in self.records)

    def count(self, kind: str) -> int:
        """How many exchanges of one kind (``"p2p"``, ``"all_gather"``, ``"all_reduce"``)."""
        return sum(record.kind == kind for record in self.records)

    def add_fallback(self, op: str, shapes: str, where: str, size_bytes: int) -> None:
        for known in self.fallbacks:
            if (known.op, known.shapes, known.where) == (op, shapes, where):
                break
        else:
            known = Fallback(op, shapes, where)
            self.fallbacks.append(known)
        known.count += 1
        known.bytes += size_bytes

    def table(self) -> str:
        """A text table: kind, op, calls, bytes and messages sent; then the fallbacks."""
        calls: Counter[tuple[str, str]] = Counter()
        sent: Counter[tuple[str, str]] = Counter()
        messages: Counter[tuple[str, str]] = Counter()
        for record in self.records:
            key = (record.kind, record.op)
            calls[key] += 1
            sent[key] += record.sent_bytes
            messages[key] += record.messages
        lines = [f"{'kind':12} {'op':32} {'calls':>7} {'bytes sent':>14} {'messages':>9}"]
        for (kind, op), n in sorted(calls.items()):
            key = (kind, op)
            lines.append(f"{kind:12} {op:32} {n:7} {sent[key]:14,} {messages[key]:9}")
        for fallback in self.fallbacks:
            lines.append(
                f"{'fallback':12} {fallback.op:32} {fallback.count:7} {fallback.bytes:14,} "
                f"{'':9}  {fallback.shapes} at {fallback.where}"
            )
        if self.waits:
            behind, blocked = (sum(getattr(wait, name) for wait in self.waits) for name in ("behind_s", "blocked_s"))
            lines.append(
                f"{'wait':12} {'behind the computation':32} {len(self.waits):7} "
                f"{1e3 * behind:.1f} ms under way, then waited for {1e3 * blocked:.1f} ms"
            )
        return "\n".join(lines)


class Recorder:
    """The traces that are open for one communicator.

    A backward pass may run in a thread of autograd's own, where no trace was opened: there the list
    that the forward pass saw last is used.
    """

    _thread = threading.local()

    def __init__(self) -> None:
        self._seen: list[Trace] = []

    @classmethod
    def opened(cls) -> list[Trace] | None:
        return getattr(cls._thread, "traces", None)

    def active(self) -> list[Trace]:
        opened = self.opened()
        if opened is not None:
            self._seen = opened
        return self._seen

    def record(self, kind: str, op: str, sent_bytes: int, messages: int) -> None:
        for trace in self.active():
            trace.records.append(Record(kind, op, sent_bytes, messages))

    def waited(self, op: str, behind_s: float, blocked_s: float) -> None:
        for trace in self.active():
            trace.waits.append(Wait(op, behind_s, blocked_s))

    def fallback(self, op: str, shapes: str, where: str, size_bytes: int) -> None:
        for trace in self.active():
            trace.add_fallback(op, shapes, where, size_bytes)


@contextmanager
def trace() -> Iterator[Trace]:
    """Record what this rank sends and which operations it gathers while the context is open.

    >>> with distpatch.trace() as t:
    ...     image = vae.decode(latents).sample
    >>> print(t.table())
    """
    traces = Recorder.opened()
    if traces is None:
        traces = Recorder._thread.traces = []
    current = Trace()
    traces.append(current)
    try:
        yield current
    finally:
        traces.remove(current)
