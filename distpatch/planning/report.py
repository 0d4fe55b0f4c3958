"""The report of a plan: frozen data, as a table, as JSON, and whether it fits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from distpatch.planning.hardware import Device, Link
from distpatch.planning.rank_report import OpPlan, RankPlan
from distpatch.profiling.trace import Fallback

if TYPE_CHECKING:
    from rich.console import RenderableType

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Plan:
    """What a model would do on the ranks of a group that nobody has: see ``distpatch.plan``.

    ``ranks``: those that were run, each of which stands for those that do the same. Bytes of parameters,
    buffers and inputs are those that every rank holds in full. ``mesh``: how many ranks each axis has, along which
    ``dims`` are sharded.
    """

    model: str
    method: str
    world_size: int
    mesh: tuple[int, ...]
    dims: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    parameter_bytes: int
    buffer_bytes: int
    input_bytes: int
    ranks: tuple[RankPlan, ...]
    device: Device | None
    link: Link | None
    rules_of: str

    @property
    def worst(self) -> RankPlan:
        """The rank whose activations take the most memory."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    @property
    def busiest(self) -> RankPlan:
        """The rank that takes longest; where time is not known, the one that computes most."""
        return max(self.ranks, key=lambda rank: (self.seconds_of(rank) or 0.0, rank.flops, rank.sent_bytes))

    @property
    def peak_bytes(self) -> int:
        """The most bytes of activations that a rank holds at once, as ``LivePeak`` counts them."""
        return self.worst.peak_bytes

    @property
    def memory_bytes(self) -> int:
        """Activations at their peak, parameters, buffers and inputs of the rank that needs most.

        Not in it: the workspace of a kernel, message buffers, and what an allocator keeps.
        """
        return self.peak_bytes + self.parameter_bytes + self.buffer_bytes + self.input_bytes

    @property
    def sent_bytes(self) -> int:
        """Bytes sent by the rank that sends most."""
        return max(rank.sent_bytes for rank in self.ranks)

    @property
    def messages(self) -> int:
        """Messages sent by the rank that sends most of them."""
        return max(rank.messages for rank in self.ranks)

    @property
    def rounds(self) -> int:
        """Exchanges and collectives that a rank waits for, one after the other; the most of any rank."""
        return max(rank.rounds for rank in self.ranks)

    @property
    def launches(self) -> int:
        """Kernels (operators of torch that compute or copy); the most of any rank."""
        return max(rank.launches for rank in self.ranks)

    @property
    def flops(self) -> int:
        """Floating-point operations of all ranks together."""
        return sum(rank.stands_for * rank.flops for rank in self.ranks)

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest rank over the mean of all ranks; 1.0 is even."""
        mean = self.flops / self.world_size
        return max(rank.flops for rank in self.ranks) / mean if mean else 1.0

    @property
    def replicated_share(self) -> float:
        """What every rank computes in full, over what one device would compute; the share that more ranks do not
        make faster (0.5: at most twice as fast, on any number)."""
        everywhere = max(rank.replicated_flops for rank in self.ranks)
        shared = sum(rank.stands_for * (rank.flops - rank.replicated_flops) for rank in self.ranks)
        return everywhere / (everywhere + shared) if everywhere else 0.0

    @property
    def fallbacks(self) -> list[Fallback]:
        """Operations without a sharded rule: gathered, and computed by every rank."""
        return self.worst.trace.fallbacks

    @property
    def seconds(self) -> float | None:
        """Time of the slowest rank: computing, then sending, without overlap. None without a device or link."""
        return self.seconds_of(self.busiest)

    def compute_seconds_of(self, rank: RankPlan) -> float | None:
        return rank.compute_seconds(self.device)

    def transfer_seconds_of(self, rank: RankPlan) -> float | None:
        return 0.0 if self.world_size == 1 else rank.transfer_seconds(self.link)

    @property
    def host_seconds(self) -> float | None:
        """Time that the host of the slowest rank takes to launch its kernels; None without a device."""
        return None if self.device is None else self.busiest.launches * self.device.launch_seconds

    @property
    def bound(self) -> str | None:
        """What takes most of the slowest rank's time: "computing", "host" (launching kernels) or "sending"."""
        if self.device is None or self.host_seconds is None or self.seconds is None:
            return None
        bare = self.busiest.compute_seconds(replace(self.device, launch_seconds=0.0)) or 0.0
        takes = {"computing": bare, "host": self.host_seconds, "sending": self.transfer_seconds_of(self.busiest) or 0.0}
        return max(takes, key=takes.__getitem__)

    def seconds_of(self, rank: RankPlan) -> float | None:
        parts = self.compute_seconds_of(rank), self.transfer_seconds_of(rank)
        return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]

    def fits(self, memory_bytes: float | None = None) -> bool:
        """Whether ``memory_bytes`` suffice for every rank; without a number, whether the device's do.

        Raises ``ValueError`` without a number and without a device.
        """
        if memory_bytes is None:
            if self.device is None:
                raise ValueError("fits: the plan knows no device; say how many bytes it has")
            memory_bytes = self.device.memory_bytes
        return self.memory_bytes <= memory_bytes

    def ops(self, rank: RankPlan | None = None) -> list[OpPlan]:
        """What each operation does on a rank (the busiest), the longest first."""
        return (rank or self.busiest).ops(self.device, self.link)

    def table(self) -> str:
        """Text: what the ranks need and do in sum, then each operation on the busiest rank, then the fallbacks."""
        header, *rows = self._columns()
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [*self._summary(), ""]
        for row in (header, *rows):
            cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *self._fallback_lines()])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        header, *rows = self._columns()
        table = Table(title=f"rank {self.busiest.rank}, the busiest", title_justify="left")
        for index, heading in enumerate(header):
            table.add_column(heading, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        return Group(*self._summary(), table, *self._fallback_lines())

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers and texts."""
        return {
            "model": self.model,
            "method": self.method,
            "world_size": self.world_size,
            "mesh": list(self.mesh),
            "dims": list(self.dims),
            "shapes": [list(shape) for shape in self.shapes],
            "rules_of": self.rules_of,
            "device": None if self.device is None else {**asdict(self.device), "flops": dict(self.device.flops)},
            "link": None if self.link is None else asdict(self.link),
            "parameter_bytes": self.parameter_bytes,
            "buffer_bytes": self.buffer_bytes,
            "input_bytes": self.input_bytes,
            "peak_bytes": self.peak_bytes,
            "peak_op": self.worst.peak_op,
            "peak_rank": self.worst.rank,
            "memory_bytes": self.memory_bytes,
            "sent_bytes": self.sent_bytes,
            "messages": self.messages,
            "rounds": self.rounds,
            "launches": self.launches,
            "flops": self.flops,
            "imbalance": self.imbalance,
            "replicated_share": self.replicated_share,
            "seconds": self.seconds,
            "host_seconds": self.host_seconds,
            "bound": self.bound,
            "fallbacks": [asdict(fallback) for fallback in self.fallbacks],
            "ranks": [self._rank_dict(rank) for rank in self.ranks],
        }

    def to_json(self, indent: int | None = 1) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def _rank_dict(self, rank: RankPlan) -> dict[str, Any]:
        return {
            "rank": rank.rank,
            "rows": rank.rows,
            "stands_for": rank.stands_for,
            "peak_bytes": rank.peak_bytes,
            "peak_op": rank.peak_op,
            "flops": rank.flops,
            "replicated_flops": rank.replicated_flops,
            "moved_bytes": rank.moved_bytes,
            "sent_bytes": rank.sent_bytes,
            "messages": rank.messages,
            "rounds": rank.rounds,
            "launches": rank.launches,
            "compute_seconds": self.compute_seconds_of(rank),
            "transfer_seconds": self.transfer_seconds_of(rank),
            "ops": [asdict(op) for op in self.ops(rank)],
        }

    def _summary(self) -> list[str]:
        worst, busiest, given = self.worst, self.busiest, ", ".join(str(shape) for shape in self.shapes)
        unit, size = ("GiB", GIB) if self.memory_bytes >= GIB else ("MiB", MIB)
        prefix, flops = ("T", 1e12) if self.flops >= 1e12 else ("G", 1e9)
        lines = [
            f"{self.model}.{self.method} of {given} on {self._ranks()}",
            f"memory    {self.memory_bytes / size:,.2f} {unit} a rank: activations {worst.peak_bytes / size:,.2f} "
            f"(rank {worst.rank}, at {worst.peak_op}), parameters {self.parameter_bytes / size:,.2f}, buffers "
            f"{self.buffer_bytes / size:,.2f}, inputs {self.input_bytes / size:,.2f}",
            f"compute   {self.flops / flops:,.2f} {prefix}FLOPs in all, the busiest rank {self.imbalance:.3f} "
            f"times the mean; {self.replicated_share:.1%} computed by every rank in full; {self.launches:,} kernels "
            "launched by the rank with the most",
            f"transfer  {self.sent_bytes / MIB:,.1f} MiB and {self.messages:,} messages sent in {self.rounds:,} rounds "
            "by the rank with the most",
        ]
        seconds = self.seconds
        if seconds is None or self.device is None:
            lines.append('time      not estimated: device="H100" (or another), or what distpatch.calibrate() measured')
        else:
            compute, transfer = self.compute_seconds_of(busiest) or 0.0, self.transfer_seconds_of(busiest) or 0.0
            over = "" if self.link is None or self.world_size == 1 else f" over {self.link.name}"
            least = "at the rates of the data sheet; a run takes longer" if self.device.source else "as calibrated"
            lines.append(
                f"time      {_seconds(seconds)}: computing {_seconds(compute)} on {self.device.name}, sending "
                f"{_seconds(transfer)}{over} ({least})"
            )
            if self.bound == "host":
                lines.append(
                    f"          host-bound: to launch {busiest.launches:,} kernels takes the host "
                    f"{_seconds(self.host_seconds or 0.0)}; compile=True leaves out the rules' part, fewer ranks or "
                    "larger pictures are the other way"
                )
            fits = "fits" if self.fits() else "does not fit"
            lines.append(f"          {fits} in the {self.device.memory_bytes / 1e9:,.0f} GB of one {self.device.name}")
        done = ", ".join(f"{r.rank} ({_rows(r.rows)}; stands for {r.stands_for})" for r in self.ranks)
        kind = "a CPU" if self.rules_of == "cpu" else f"a GPU ({self.rules_of})"
        lines.append(f"ranks run {done}; patches, parts and kernels as on {kind}")
        return lines

    def _ranks(self) -> str:
        mesh = "" if len(self.mesh) == 1 else f" ({' x '.join(map(str, self.mesh))} along dims {self.dims})"
        return f"{self.world_size} rank{'s' * (self.world_size > 1)}{mesh}"

    def _columns(self) -> list[tuple[str, ...]]:
        computed, sent = ("calls", "launches", "GFLOPs", "MiB moved"), ("rounds", "MiB sent", "messages")
        rows: list[tuple[str, ...]] = [("op", *computed, *sent, "compute", "transfer")]
        for op in self.ops():
            rows.append(
                (
                    op.op,
                    f"{op.calls:,}" if op.calls else "",
                    f"{op.launches:,}" if op.launches else "",
                    f"{op.flops / 1e9:,.1f}" if op.flops else "",
                    f"{op.moved_bytes / MIB:,.1f}" if op.moved_bytes else "",
                    f"{op.rounds:,}" if op.rounds else "",
                    f"{op.sent_bytes / MIB:,.3f}" if op.rounds else "",
                    f"{op.messages:,}" if op.rounds else "",
                    "" if not op.compute_seconds else _seconds(op.compute_seconds),
                    "" if not op.transfer_seconds else _seconds(op.transfer_seconds),
                )
            )
        return rows

    def _fallback_lines(self) -> list[str]:
        if not self.fallbacks:
            return ["no operation is gathered"]
        return [
            f"gathered: {f.op}, {f.count} times, {f.bytes / MIB:,.1f} MiB, {f.shapes} at {f.where}"
            for f in self.fallbacks
        ]


def _rows(rows: int | tuple[int, ...]) -> str:
    return f"{rows} rows" if isinstance(rows, int) else " x ".join(map(str, rows))


def _seconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
