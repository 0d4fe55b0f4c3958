"""What a run sent, computed and gathered: counted where it happens, read by ``trace()``."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch.autograd import profiler

from distpatch.profiling.op_costs import Mark, Meter, OpCost, gathered, mark, seconds_between


@dataclass
class Record:
    """One exchange or collective of this rank.

    ``kind`` is ``"p2p"`` or the collective's name, ``op`` the operation that asked for it; bytes are
    those that this rank sent. ``wait_seconds``: from its first message until all had landed, when this rank
    computes nothing (on CUDA: as long as the stream that computes waits); where it computes meanwhile, those after it.
    """

    kind: str
    op: str
    sent_bytes: int
    messages: int
    span: tuple[Mark, Mark] | None = field(default=None, compare=False, repr=False)

    @property
    def wait_seconds(self) -> float:
        return 0.0 if self.span is None else seconds_between(*self.span)

    @property
    def is_round(self) -> bool:
        """Whether this rank waits for others: not alone, and not for messages that run behind the computation."""
        return self.kind == "p2p" or (self.kind != "displaced" and self.messages > 0)


@dataclass(frozen=True)
class Wait:
    """One wait for messages that ran behind the computation: halo rows, or those of a displaced step.

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


@dataclass
class Fused:
    """Deferred steps computed together, patch by patch; ``spared_bytes``: of intermediates never materialised."""

    steps: str
    count: int = 0
    spared_bytes: int = 0


@dataclass
class Whole:
    """Calls that every rank computed whole (``convert_model(policy="auto")``).

    ``call``: entry point and signature. Seconds of the slowest rank, whole and sharded; None while both are tried.
    """

    call: str
    count: int = 0
    seconds: float | None = None
    sharded_seconds: float | None = None

    def __str__(self) -> str:
        why = "a trial"
        if self.seconds is not None and self.sharded_seconds is not None:
            why = f"{1e3 * self.seconds:.1f} ms against {1e3 * self.sharded_seconds:.1f} ms sharded"
        return f"{self.call}: computed whole on every rank, {why} ({self.count} times)"


@dataclass
class Traffic:
    """All exchanges of one kind that one operation asked for, on this rank."""

    kind: str
    op: str
    calls: int = 0
    rounds: int = 0
    sent_bytes: int = 0
    messages: int = 0
    wait_seconds: float = 0.0


@dataclass(eq=False)
class Trace:
    """Everything recorded on this rank while the trace was open.

    ``meter``: what it computed, where the trace was to measure that.
    """

    records: list[Record] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    fused: dict[str, Fused] = field(default_factory=dict)
    meter: Meter | None = None
    waits: list[Wait] = field(default_factory=list)
    whole: dict[str, Whole] = field(default_factory=dict)

    @property
    def sent_bytes(self) -> int:
        return sum(record.sent_bytes for record in self.records)

    @property
    def messages(self) -> int:
        return sum(record.messages for record in self.records)

    @property
    def rounds(self) -> int:
        """Exchanges and collectives that this rank waited for, one after the other."""
        return sum(record.is_round for record in self.records)

    @property
    def launches(self) -> int | None:
        """Kernels launched (``launches_of``); None where they were not measured."""
        return None if self.meter is None else self.meter.launches

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

    def add_fused(self, steps: str, spared_bytes: int) -> None:
        known = self.fused.setdefault(steps, Fused(steps))
        known.count += 1
        known.spared_bytes += spared_bytes

    def add_whole(self, call: str, seconds: tuple[float, float] | None) -> None:
        known = self.whole.setdefault(call, Whole(call))
        known.count += 1
        known.seconds, known.sharded_seconds = seconds or (None, None)

    @property
    def wait_seconds(self) -> float:
        """Seconds that this rank waited for others."""
        return sum(record.wait_seconds for record in self.records)

    @property
    def peak_bytes(self) -> int | None:
        """The most bytes of activations alive at once (``LivePeak``); None where it was not measured."""
        return None if self.meter is None else self.meter.peak_bytes

    @property
    def flops(self) -> int | None:
        """Floating-point operations of this rank; None where they were not measured."""
        return None if self.meter is None else sum(cost.flops for cost in self.ops().values())

    def ops(self) -> dict[str, OpCost]:
        """What each torch function cost on this rank; empty where it was not measured."""
        return {} if self.meter is None else self.meter.costs()

    def traffic(self) -> list[Traffic]:
        """The records summed by kind and operation."""
        sums: dict[tuple[str, str], Traffic] = {}
        for record in self.records:
            total = sums.setdefault((record.kind, record.op), Traffic(record.kind, record.op))
            total.calls += 1
            total.rounds += record.is_round
            total.sent_bytes += record.sent_bytes
            total.messages += record.messages
            total.wait_seconds += record.wait_seconds
        return [sums[key] for key in sorted(sums)]

    def table(self) -> str:
        """A text table: kind, op, calls, bytes and messages sent, time waited; the fallbacks; what was computed."""
        lines = [f"{'kind':12} {'op':32} {'calls':>7} {'bytes sent':>14} {'messages':>9} {'wait ms':>9}"]
        for t in self.traffic():
            lines.append(
                f"{t.kind:12} {t.op:32} {t.calls:7} {t.sent_bytes:14,} {t.messages:9} {t.wait_seconds * 1e3:9.1f}"
            )
        for fallback in self.fallbacks:
            lines.append(
                f"{'fallback':12} {fallback.op:32} {fallback.count:7} {fallback.bytes:14,} "
                f"{'':9}  {fallback.shapes} at {fallback.where}"
            )
        for fused in self.fused.values():
            lines.append(f"{'fused':12} {fused.steps} ({fused.count} times, {fused.spared_bytes:,} bytes spared)")
        lines += [f"{'whole':12} {whole}" for whole in self.whole.values()]
        if self.meter is not None:
            lines.append("")
            lines.append(f"{'computed':45} {'calls':>7} {'launches':>9} {'GFLOPs':>14} {'MiB moved':>9} {'ms':>9}")
            for cost in sorted(self.ops().values(), key=lambda c: -c.seconds):
                lines.append(
                    f"{cost.op:45} {cost.calls:7} {cost.launches:9,} {cost.flops / 1e9:14,.3f} "
                    f"{cost.moved_bytes / 2**20:9,.0f} {cost.seconds * 1e3:9.1f}"
                )
            lines.append(f"{self.launches:,} kernels launched, {self.rounds:,} rounds of messages")
            lines.append(f"live activations at most {self.meter.peak_mib:,.1f} MiB, at {self.meter.peak_op}")
        if self.waits:
            behind, blocked = (sum(getattr(wait, name) for wait in self.waits) for name in ("behind_s", "blocked_s"))
            lines.append(
                f"{'wait':12} {'behind the computation':32} {len(self.waits):7} "
                f"{1e3 * behind:.1f} ms under way, then waited for {1e3 * blocked:.1f} ms"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers and texts; what was not measured is None."""
        meter = self.meter
        return {
            "sent_bytes": self.sent_bytes,
            "messages": self.messages,
            "rounds": self.rounds,
            "launches": self.launches,
            "wait_seconds": self.wait_seconds,
            "flops": self.flops,
            "peak_bytes": self.peak_bytes,
            "peak_op": None if meter is None else meter.peak_op,
            "transfers": [asdict(t) for t in self.traffic()],
            "ops": [asdict(cost) for cost in self.ops().values()],
            "fused": [asdict(fused) for fused in self.fused.values()],
            "waits": [asdict(wait) for wait in self.waits],
            "whole": [asdict(whole) for whole in self.whole.values()],
            "fallbacks": [asdict(fallback) for fallback in self.fallbacks],
        }

    def to_json(self, indent: int | None = 1) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)


class Recorder:
    """The traces that are open for one communicator.

    A backward pass may run in a thread of autograd's own, where no trace was opened: there the list
    that the forward pass saw last is used.
    """

    _thread = threading.local()
    listening: ClassVar[set[Trace]] = set()  # every trace that is open, in any thread

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

    def record(
        self, kind: str, op: str, sent_bytes: int, messages: int, span: tuple[Mark, Mark] | None = None
    ) -> Record:
        record = Record(kind, op, sent_bytes, messages, span)
        for trace in self.active():
            trace.records.append(record)
        return record

    @contextmanager
    def transfer(self, kind: str, op: str, sent_bytes: int, messages: int, device: torch.device) -> Iterator[Record]:
        """Around an exchange: recorded and timed where a trace is open, a named range where a profiler runs."""
        start = mark(device)
        record = self.record(kind, op, sent_bytes, messages)
        with _range(f"distpatch {kind} of {op}"):
            try:
                yield record
            finally:
                record.span = start, mark(device)

    @contextmanager
    def wait(self, record: Record, started: float, device: torch.device) -> Iterator[None]:
        """Around the wait for an exchange that has run behind the computation since ``started``: its record's."""
        asked, start = time.perf_counter(), mark(device)
        with _range(f"distpatch wait of {record.op}"):
            try:
                yield
            finally:
                record.span = start, mark(device)
                self.waited(record.op, asked - started, time.perf_counter() - asked)

    @classmethod
    def fused(cls, steps: str, spared_bytes: int) -> None:
        """Of this thread, whichever the group: what is computed later sends nothing."""
        for trace in cls.opened() or ():
            trace.add_fused(steps, spared_bytes)

    def whole(self, call: str, seconds: tuple[float, float] | None) -> None:
        for trace in self.active():
            trace.add_whole(call, seconds)

    def waited(self, op: str, behind_s: float, blocked_s: float) -> None:
        for trace in self.active():
            trace.waits.append(Wait(op, behind_s, blocked_s))

    def fallback(self, op: str, shapes: str, where: str, size_bytes: int) -> None:
        gathered()
        for trace in self.active():
            trace.add_fallback(op, shapes, where, size_bytes)


def _range(name: str) -> AbstractContextManager[Any]:
    return profiler.record_function(name) if profiler._is_profiler_enabled else nullcontext()


@contextmanager
def trace(*, measure: bool = False) -> Iterator[Trace]:
    """Record what this rank sends and which operations it gathers while the context is open.

    >>> with distpatch.trace() as t:
    ...     image = vae.decode(latents).sample
    >>> print(t.table())

    ``measure``: also what it computes, by torch function (FLOPs, bytes moved, seconds), and the peak of live
    activations. That looks at every operation, which costs each of them tens of microseconds; of a compiled
    graph only the transfers are seen.
    """
    traces = Recorder.opened()
    if traces is None:
        traces = Recorder._thread.traces = []
    current = Trace()
    traces.append(current)
    Recorder.listening.add(current)
    try:
        if measure:
            with Meter(timed=True) as current.meter:
                yield current
        else:
            yield current
    finally:
        traces.remove(current)
        Recorder.listening.discard(current)
