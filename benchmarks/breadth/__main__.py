"""Nets of every kind on two ranks of one thread, against one process of two threads.

    python -m benchmarks.breadth --rounds 3 --only 3-D --json breadth.json --plot breadth.png

Both are started once a net and take turns, one at a time: read the ratios of the rounds. Random weights, float32,
on CPUs. Memory is measured in passes of its own: live activations by counting tensors, the resident peak
(``--resident``) in fresh processes.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.progress import track

from benchmarks._harness.crew import Crew
from benchmarks._harness.plots import OTHERS, OURS, drawing
from benchmarks._harness.printed import machine, markdown_table, said, wide_console
from benchmarks._harness.resident import PROMPT_FREE
from benchmarks.breadth.nets import NETS

WORKER = "benchmarks.breadth.worker"
LEGEND = (
    "x: time of one process over that of the ranks, median of the rounds (range), above 1 the ranks are faster; s: of "
    "the ranks, and before, of one process; live, resident: of the rank with the most over one process's; error: "
    "largest, over the result's largest value; rounds of messages, and the share of a traced call's time that the rank "
    "that waits most waited for them"
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Result:
    """What was measured of one net; pairs are of one process and of the ranks, of which the worst."""

    net: str
    seconds: list[tuple[float, float]] = field(default_factory=list)
    live_bytes: tuple[int, int] = (0, 0)
    resident_bytes: tuple[int, int] | None = None
    fallbacks: int = 0
    error: float = 0.0
    rounds: int = 0
    waited: float = 0.0  # share of the seconds of a traced call

    @property
    def ratios(self) -> list[float]:
        return [alone / shared for alone, shared in self.seconds]


def crews(stack: ExitStack, net: str, ranks: int, **env: str) -> list[Crew]:
    """One process, and ranks of one thread."""
    sizes = ((1, ranks), (ranks, 1))
    return [stack.enter_context(Crew(WORKER, {"net": net, "ranks": n}, n, threads, **env)) for n, threads in sizes]


def measure(net: str, ranks: int, rounds: int, resident: bool) -> Result:
    result = Result(net)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        right = str(Path(folder) / "result.pt")
        alone, shared = crews(stack, net, ranks)
        for _ in range(rounds + 1):
            first, second = (max(answer["seconds"] for answer in crew.ask("time")) for crew in (alone, shared))
            result.seconds.append((first, second))
        del result.seconds[0]  # the first calls load kernels and make plans
        alone.ask("save", path=right)
        result.error = max(answer["error"] for answer in shared.ask("compare", path=right))
        waits = max(shared.ask("waits"), key=lambda answer: float(answer["waited"]))
        result.rounds, result.waited = waits["rounds"], waits["waited"] / waits["seconds"]
        live = [crew.ask("live") for crew in (alone, shared)]
        first, second = (max(answer["live_bytes"] for answer in answers) for answers in live)
        result.live_bytes, result.fallbacks = (first, second), live[1][0]["fallbacks"]
    if resident:
        with ExitStack() as stack:
            first, second = (
                max(answer["resident_bytes"] for answer in crew.ask("resident"))
                for crew in crews(stack, net, ranks, **PROMPT_FREE)
            )
            result.resident_bytes = first, second
    return result


def table(results: list[Result], ranks: int) -> Any:
    headings = ("x (range)", "s", "s before", "live", "resident", "fallbacks", "error", "rounds", "waited")
    shown = markdown_table(f"{ranks} ranks of one thread, one process of {ranks}", "net", *headings)
    for result in results:
        ratios, (before, after) = result.ratios, result.live_bytes
        alone, shared = (f"{median(each):.3f}" for each in zip(*result.seconds))
        resident = ""
        if result.resident_bytes is not None:
            resident = f"{result.resident_bytes[1] / result.resident_bytes[0]:.2f}"
        times = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        kept = (f"{after / before:.2f}", resident, str(result.fallbacks), f"{result.error:.0e}")
        shown.add_row(result.net, times, shared, alone, *kept, str(result.rounds), f"{result.waited:.0%}")
    return shown


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each net is timed.")] = 3,
    only: Annotated[
        list[str] | None, typer.Option(help="Nets whose name contains this; give it several times.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks, and threads of the one process.")] = 2,
    resident: Annotated[bool, typer.Option(help="Also the resident peak, in fresh processes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw them here.")] = None,
    from_file: Annotated[Path | None, typer.Option("--from", help="Show what --json wrote; measure nothing.")] = None,
) -> None:
    """How much faster are ranks than threads, for nets of every kind?"""
    known = json.loads(from_file.read_text()) if from_file else {"machine": machine(), "ranks": ranks, "results": []}
    console, about, ranks = wide_console(), known["machine"], known["ranks"]
    results = [Result(**numbers) for numbers in known["results"]]
    console.print(said(about, f"{rounds} rounds"))
    chosen = [net for net in NETS if only is None or any(part in net for part in only)]
    for net in track(chosen, console=console, transient=True) if from_file is None else ():
        results.append(measure(net, ranks, rounds, resident))
    console.print(table(results, ranks))
    middle = [median(result.ratios) for result in results]
    at_least = sum(value >= 1 for value in middle)
    console.print(f"median {median(middle):.2f}; {at_least} of {len(middle)} nets at least as fast. {LEGEND}")
    if json_file is not None:
        numbers = [asdict(result) for result in results]
        json_file.write_text(json.dumps({"machine": about, "ranks": ranks, "results": numbers}, indent=1) + "\n")
    if plot_file is not None:
        plot(results, f"{ranks} ranks of one thread, one process of {ranks} ({about['cpu']})", plot_file)


def plot(results: list[Result], title: str, path: Path) -> None:
    """A bar a net: how many times faster the ranks are."""
    ordered = sorted(results, key=lambda result: median(result.ratios))
    middle = [median(result.ratios) for result in ordered]
    below = [value - min(result.ratios) for value, result in zip(middle, ordered)]
    above = [max(result.ratios) - value for value, result in zip(middle, ordered)]
    with drawing(path, 8, 0.28 * len(ordered) + 1.2, title) as figure:
        axes = figure.subplots()
        colors = [OURS if value >= 1 else OTHERS for value in middle]
        axes.barh([result.net for result in ordered], middle, xerr=(below, above), color=colors, ecolor="black")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xlabel("times as fast as one process; the thin line is the range of the rounds")


if __name__ == "__main__":
    app()
