"""One rank's part of a plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from distpatch.planning.hardware import Device, Link, compute_seconds, transfer_seconds
from distpatch.profiling.op_costs import Kernel, OpCost, costs_of, launches_of
from distpatch.profiling.trace import Trace


@dataclass(frozen=True)
class OpPlan:
    """One operation on one rank: what it computes, and what it sends, in how many ``rounds`` that it waits for.

    Seconds are None without a device or link.
    """

    op: str
    calls: int
    launches: int
    flops: int
    moved_bytes: int
    replicated_flops: int
    rounds: int
    sent_bytes: int
    messages: int
    compute_seconds: float | None
    transfer_seconds: float | None


@dataclass(frozen=True)
class RankPlan:
    """What one rank would do. ``stands_for``: how many ranks do the same; ``rows``: its share of the image's rows;
    on a mesh, along each dim."""

    rank: int
    rows: int | tuple[int, ...]
    stands_for: int
    peak_bytes: int
    peak_op: str
    kernels: Counter[Kernel]
    calls: Counter[str]
    trace: Trace

    @property
    def sent_bytes(self) -> int:
        return self.trace.sent_bytes

    @property
    def messages(self) -> int:
        return self.trace.messages

    @property
    def rounds(self) -> int:
        """Exchanges and collectives that the rank waits for, one after the other."""
        return self.trace.rounds

    @cached_property
    def launches(self) -> int:
        """Kernels, as ``launches_of`` in profiling/op_costs.py counts them."""
        return launches_of(self.kernels)

    @cached_property
    def costs(self) -> dict[str, OpCost]:
        """By torch function; without seconds."""
        return costs_of(self.kernels, self.calls)

    @cached_property
    def flops(self) -> int:
        return sum(times * kernel.flops for kernel, times in self.kernels.items())

    @cached_property
    def replicated_flops(self) -> int:
        """FLOPs that every rank computes in full, on replicated or gathered tensors."""
        return sum(times * kernel.flops for kernel, times in self.kernels.items() if kernel.replicated)

    @cached_property
    def moved_bytes(self) -> int:
        """Bytes that operations read and write."""
        return sum(times * kernel.moved_bytes for kernel, times in self.kernels.items())

    def compute_seconds(self, device: Device | None) -> float | None:
        return None if device is None else compute_seconds(self.kernels, device)

    def transfer_seconds(self, link: Link | None) -> float | None:
        return None if link is None else transfer_seconds(self.trace.records, link)

    def ops(self, device: Device | None, link: Link | None) -> list[OpPlan]:
        """What each operation does, the longest first."""
        found = []
        for op in dict.fromkeys([*self.costs, *(record.op for record in self.trace.records)]):
            cost = self.costs.get(op, OpCost(op))
            records = [record for record in self.trace.records if record.op == op]
            kernels = {kernel: times for kernel, times in self.kernels.items() if kernel.op == op}
            found.append(
                OpPlan(
                    op,
                    cost.calls,
                    cost.launches,
                    cost.flops,
                    cost.moved_bytes,
                    cost.replicated_flops,
                    sum(record.is_round for record in records),
                    sum(record.sent_bytes for record in records),
                    sum(record.messages for record in records),
                    None if device is None else compute_seconds(kernels, device),
                    None if link is None else transfer_seconds(records, link),
                )
            )
        return sorted(found, key=lambda o: (-(o.compute_seconds or 0) - (o.transfer_seconds or 0), -o.moved_bytes))
