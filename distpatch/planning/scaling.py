"""``scaling``: plans for many world sizes, side by side, and their plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distpatch.planning.fake_run import Subject
from distpatch.planning.hardware import Device, Link
from distpatch.planning.report import GIB, MIB, Plan

POWERS = tuple(1 << n for n in range(10))  # 1 ... 512


@dataclass(frozen=True)
class Scaling:
    """Plans of one model, by world size; see ``distpatch.scaling``."""

    plans: tuple[Plan, ...]

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def smallest(self, memory_bytes: float | None = None) -> Plan | None:
        """The first of these plans that fits in so many bytes a rank (None: the device's); None if none does."""
        return next((plan for plan in self.plans if plan.fits(memory_bytes)), None)

    @property
    def fastest(self) -> Plan | None:
        """The plan that takes least time, of several the one with the fewest ranks; None where time is not known."""
        timed = [plan for plan in self.plans if plan.seconds is not None]
        return min(timed, key=lambda plan: (plan.seconds, plan.world_size), default=None)

    def table(self) -> str:
        """Text, a line a world size: memory, FLOPs, traffic of the rank with most, and the estimate of time.

        The last column says what takes most of it (``Plan.bound``).
        """
        first = self.plans[0]
        lines = [
            f"{first.model}.{first.method} of {', '.join(map(str, first.shapes))}",
            f"{'ranks':>5} {'memory GiB':>11} {'activations GiB':>16} {'TFLOPs a rank':>14} {'imbalance':>10} "
            f"{'replicated':>11} {'launches':>9} {'rounds':>7} {'sent MiB':>11} {'messages':>9} {'seconds':>9} "
            f"{'bound by':>9}",
        ]
        for plan in self.plans:
            seconds = "" if plan.seconds is None else f"{plan.seconds:.4g}"
            lines.append(
                f"{plan.world_size:5} {plan.memory_bytes / GIB:11,.2f} {plan.peak_bytes / GIB:16,.3f} "
                f"{max(rank.flops for rank in plan.ranks) / 1e12:14,.3f} {plan.imbalance:10.3f} "
                f"{plan.replicated_share:11.1%} {plan.launches:9,} {plan.rounds:7,} "
                f"{plan.sent_bytes / MIB:11,.1f} {plan.messages:9,} {seconds:>9} {plan.bound or '':>9}"
            )
        if (fastest := self.fastest) is not None and fastest is not self.plans[-1]:
            lines.append(f"more than {fastest.world_size} rank{'s' * (fastest.world_size > 1)} take longer")
        return "\n".join(lines)

    def to_json(self, indent: int | None = 1) -> str:
        """A list of what ``Plan.to_dict`` gives."""
        return json.dumps([plan.to_dict() for plan in self.plans], indent=indent)

    def plot(self, path: Path | str) -> None:
        """Memory a rank and estimated time against the number of ranks, as a picture (needs matplotlib)."""
        from matplotlib.figure import Figure

        sizes = [plan.world_size for plan in self.plans]
        timed = all(plan.seconds is not None for plan in self.plans)
        figure = Figure(figsize=(9.6 if timed else 4.8, 3.6), layout="constrained")
        memory, *times = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
        memory.plot(sizes, [plan.memory_bytes / GIB for plan in self.plans], "o-", label="in all")
        memory.plot(sizes, [plan.peak_bytes / GIB for plan in self.plans], "s--", label="activations")
        if (device := self.plans[0].device) is not None:
            memory.axhline(device.memory_bytes / GIB, color="grey", lw=0.8, label=f"one {device.name}")
        memory.set(xlabel="ranks", ylabel="GiB a rank", title="memory", xscale="log", yscale="log")
        for axes in times:
            seconds = [plan.seconds or 0.0 for plan in self.plans]
            axes.plot(sizes, seconds, "o-", label="planned")
            axes.plot(sizes, [seconds[0] * sizes[0] / n for n in sizes], color="grey", lw=0.8, label="linear")
            axes.set(xlabel="ranks", ylabel="seconds", title="time, at the device's rates", xscale="log", yscale="log")
        for axes in (memory, *times):
            axes.set_xticks(sizes, [str(n) for n in sizes])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(path, dpi=120)


def scaling(
    model: nn.Module,
    *args: Any,
    world_sizes: Sequence[int | Sequence[int]] = POWERS,
    method: str | None = None,
    device: Device | str = "H100",
    host: float | None = None,
    link: Link | str | None = None,
    ranks: Sequence[int] | None = None,
    backward: bool = False,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Scaling:
    """``distpatch.plan`` for several world sizes: 1, 2, 4 ... 512, or ``world_sizes``; other arguments as there."""
    subject = Subject(model, args, kwargs, method=method, device=device, host=host, backward=backward, options=options)
    return Scaling(tuple(subject.plan(size, link=link, ranks=ranks) for size in world_sizes))
