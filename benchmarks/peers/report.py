"""What ``peers.py`` measured, as a table and as a plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks._harness.plots import FAILED, OTHERS, OURS, drawing
from benchmarks._harness.printed import markdown_table
from benchmarks._harness.resident import MIB

NOT_FOR_IT = "NotImplementedError"  # raised in peer_runs.py, where a peer does not do such networks
LEGEND = (
    "time: median; x: of one process with as many threads as the others have ranks; live (activations), resident, "
    "sent and calls: the rank with the most; error: largest difference from the same network in float64, over the "
    "largest value. What DTensor and ShardTensor hold inside one operation is not in their live column, but in the "
    "resident one."
)


@dataclass
class Result:
    """What was measured of one peer on one network; of ranks, the worst."""

    peer: str
    workload: str
    size: int
    ranks: int
    problem: str = ""
    seconds: list[float] = field(default_factory=list)
    live_bytes: int | None = None
    resident_bytes: int | None = None
    sent_bytes: int | None = None
    calls: int | None = None
    error: float | None = None
    versions: dict[str, str] = field(default_factory=dict)


def table(results: list[Result]) -> Any:
    """One line a peer."""
    headings = ("peer", "ranks", "time s", "x", "live MiB", "resident +MiB", "sent MiB", "calls", "error")
    lines = markdown_table(f"{results[0].workload}, {results[0].size} x {results[0].size}", *headings)
    base = median(results[0].seconds) if results[0].seconds else None
    for result in results:
        if result.problem:
            said = "not for it" if NOT_FOR_IT in result.problem else "failed"
            lines.add_row(result.peer, str(result.ranks), said, *[""] * 6)
            continue
        seconds = median(result.seconds)
        traffic = (f"{(result.sent_bytes or 0) / MIB:.1f}", str(result.calls)) if result.ranks > 1 else ("", "")
        lines.add_row(
            result.peer,
            str(result.ranks),
            f"{seconds:.3f}",
            f"{seconds / base:.2f}" if base else "",
            f"{(result.live_bytes or 0) / MIB:.1f}",
            f"{(result.resident_bytes or 0) / MIB:.1f}",
            *traffic,
            f"{result.error:.1e}",
        )
    return lines


def show(results: list[Result], console: Console) -> None:
    """The table of one network, and what those said that have no numbers."""
    console.print(table(results))
    for result in results:
        if result.problem:
            console.print(f"{result.peer}: {result.problem}", markup=False)


def plot(results: list[Result], path: Path) -> None:
    """Time, memory and error of every peer, one row of panels a network."""
    workloads = list(dict.fromkeys(result.workload for result in results))
    names = list(dict.fromkeys(result.peer for result in results))[::-1]
    with drawing(path, 11, 0.5 + 2.6 * len(workloads)) as figure:
        axes = figure.subplots(len(workloads), 3, squeeze=False, sharey=True)
        _fill(axes, workloads, names, results)


def _fill(axes: Any, workloads: list[str], names: list[str], results: list[Result]) -> None:
    for row, workload in zip(axes, workloads, strict=True):
        here = {result.peer: result for result in results if result.workload == workload}
        size = next(iter(here.values())).size
        for panel, (title, value) in zip(
            row,
            {
                "seconds": lambda r: median(r.seconds) if r.seconds else 0,
                "MiB of live activations a rank": lambda r: (r.live_bytes or 0) / MIB,
                "largest error against float64": lambda r: r.error or 0,
            }.items(),
            strict=True,
        ):
            values = [0 if here[name].problem else value(here[name]) for name in names]
            colours = [OURS if name == "distpatch" else OTHERS for name in names]
            panel.barh(names, values, color=colours)
            if "error" in title:
                panel.set_xscale("log")
                panel.set_xlim(1e-8, 100)
            else:
                panel.set_xlim(0, 1.2 * max(values))
            for index, (name, found) in enumerate(zip(names, values, strict=True)):
                failed = here[name].problem
                text = f"{found:.1e}" if "error" in title else f"{found:.3g}"
                if failed:
                    text = "not for it" if NOT_FOR_IT in failed else "failed"
                at = panel.get_xlim()[0] if failed else found
                panel.annotate(f" {text}", (at, index), va="center", fontsize=8, color=FAILED if failed else "black")
            panel.set_title(f"{workload}, {size} x {size}: {title}", fontsize=8)
            panel.tick_params(labelsize=8)
