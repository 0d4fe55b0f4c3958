"""What messages between processes of one host cost on CPUs, and what their scheduling does about it.

    python -m benchmarks.messages --rounds 9
    python -m benchmarks.messages --ranks 4    # of one thread each; not bound, where the cores do not suffice

Linux alone. Each of four ways in turn: gloo's threads of sockets as torch starts them, or such that they take no core
from a thread that computes; ranks where the kernel puts them, or each on its share of the cores.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks._harness.crew import Crew
from benchmarks._harness.printed import machine, markdown_table, said, wide_console
from benchmarks.messages.worker import MESSAGES, TURNS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CALLS = ("UNETR, 2-D", "BasicUNet", "pixel U-Net step", "U-Net step, 3-D")


@dataclass
class Way:
    """How threads are scheduled, and what was measured on the slowest rank in each round."""

    name: str
    yields: bool
    bound: bool
    found: list[dict[str, float]] = field(default_factory=list)


@app.command()
def main(
    ranks: Annotated[int, typer.Option(min=2)] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
) -> None:
    """Messages behind a convolution, and calls of converted nets, by how threads are scheduled."""
    ways = [
        Way("as the kernel likes", False, False),
        Way("each rank on its cores", False, True),
        Way("gloo's threads yield", True, False),
        Way("both, as distpatch does", True, True),
    ]
    if ranks > (os.cpu_count() or 1):
        ways = [way for way in ways if not way.bound]
    with Crew("benchmarks.messages.worker", {"names": CALLS}, ranks, 1) as crew:
        for counts in range(-1, rounds):  # the first to warm up
            for way in ways:
                answers = crew.ask("run", yields=way.yields, bound=way.bound)
                if counts >= 0:
                    way.found.append({name: max(answer[name] for answer in answers) for name in answers[0]})
    headings = [*(f"{name}, us" for name in MESSAGES), *(f"{name}, ms" for name in CALLS)]
    shown = markdown_table(f"{ranks} ranks of one thread: the slowest, median (range)", "", *headings)
    for way in ways:
        columns = [sorted(one[name] for one in way.found) for name in (*MESSAGES, *CALLS)]
        shown.add_row(way.name, *(f"{median(each):.0f} ({each[0]:.0f}-{each[-1]:.0f})" for each in columns))
    console, about = wide_console(), machine()
    console.print(said(about, f"{rounds} rounds; a message is the mean of {TURNS}"))
    console.print(shown)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": about, "ways": [asdict(way) for way in ways]}, indent=1) + "\n")


if __name__ == "__main__":
    app()
