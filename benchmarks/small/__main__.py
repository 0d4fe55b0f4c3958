"""Pictures of 64 and 128 pixels on two ranks of one thread, sharded and with ``policy="auto"``, and in one process.

    python -m benchmarks.small --rounds 20 --only U-Net --json small.json

One process is timed with two threads and with one: a call that two ranks of one thread compute whole takes what
one thread takes, and it is for those nets that gain nothing from a second thread. Contestants take turns, one
call at a time; times are the minimum over the rounds, and x is the time of one process of two threads over theirs.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from benchmarks._harness.crew import Crew
from benchmarks._harness.printed import machine, markdown_table, said, wide_console
from benchmarks.breadth.nets import NETS

WORKER = "benchmarks.breadth.worker"
SETTLED = 10  # calls, after which policy="auto" has chosen
SIDES = (64, 128)
PIXELS_PER_ROW = {"KL decode": 8}  # of the picture, for a row of the input; 1 where nothing is said
SMALL = ("KL decode", "pixel U-Net step", "U-Net, batch norm", "BasicUNet", "SegFormer")
# name, ranks, threads of each, policy
CONTESTANTS = (
    ("one process, 2 threads", 1, 2, "shard"),
    ("one process, 1 thread", 1, 1, "shard"),
    ("sharded", 2, 1, "shard"),
    ("auto", 2, 1, "auto"),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Result:
    """Seconds of each contestant's calls, the slowest rank's; ``whole``: what the ranks say of the way they chose."""

    net: str
    side: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)

    def fastest(self, name: str) -> float:
        return min(self.seconds[name])


def measure(net: str, side: int, rounds: int) -> Result:
    result = Result(net, side)
    rows = side // PIXELS_PER_ROW.get(net, 1)
    shapes = [[*shape[:2], rows, rows] for shape in NETS[net].shapes]
    with ExitStack() as stack:
        crews = {
            name: stack.enter_context(
                Crew(WORKER, {"net": net, "ranks": ranks, "shapes": shapes, "policy": policy}, ranks, threads)
            )
            for name, ranks, threads, policy in CONTESTANTS
        }
        for number in range(SETTLED + rounds):
            for name, crew in crews.items():
                slowest = max(answer["seconds"] for answer in crew.ask("time"))
                if number >= SETTLED:
                    result.seconds.setdefault(name, []).append(slowest)
        result.whole = crews["auto"].ask("whole")[0]["whole"]
    return result


def table(results: list[Result]) -> Any:
    names = [name for name, *_ in CONTESTANTS]
    shown = markdown_table("ms, times as fast as one process of 2 threads", "net", "side", *names, "auto is")
    for result in results:
        least = [result.fastest(name) for name in names]
        cells = [f"{1e3 * seconds:.2f} ({least[0] / seconds:.2f})" for seconds in least]
        shown.add_row(result.net, str(result.side), *cells, "whole" if result.whole else "sharded")
    return shown


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed, once the way is chosen.")] = 20,
    only: Annotated[
        list[str] | None, typer.Option(help="Nets whose name contains this; give it several times.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
) -> None:
    """Do two ranks lose time on small pictures?"""
    console, about = wide_console(), machine()
    console.print(said(about, f"{rounds} rounds"))
    chosen = [(net, side) for net in SMALL if only is None or any(part in net for part in only) for side in SIDES]
    results = [measure(net, side, rounds) for net, side in track(chosen, console=console, transient=True)]
    console.print(table(results))
    if json_file is not None:
        numbers = [asdict(result) for result in results]
        json_file.write_text(json.dumps({"machine": about, "results": numbers}, indent=1) + "\n")


if __name__ == "__main__":
    app()
