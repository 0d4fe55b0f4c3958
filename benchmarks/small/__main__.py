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
from typing import Annotated

import typer

from benchmarks._harness.crew import Crew, machine, wide_console
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


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed, once the way is chosen.")] = 20,
    only: Annotated[
        list[str] | None, typer.Option(help="Nets whose name contains this; give it several times.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
) -> None:
    """Do two ranks lose time on small pictures?"""
    console, about, results = wide_console(), machine(), []
    console.print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {rounds} rounds")
    names = [name for name, *_ in CONTESTANTS]
    console.print(f"{'net':20}{'side':>5}" + "".join(f"{name:>24}" for name in names) + "  way", highlight=False)
    for net in SMALL:
        for side in SIDES if only is None or any(part in net for part in only) else ():
            results.append(result := measure(net, side, rounds))
            times = "".join(
                f"{1e3 * result.fastest(name):12.2f} ms {result.fastest(names[0]) / result.fastest(name):5.2f} x "
                for name in names
            )
            console.print(f"{net:20}{side:5} {times}  {'whole' if result.whole else 'sharded'}", highlight=False)
    if json_file is not None:
        numbers = [asdict(result) for result in results]
        json_file.write_text(json.dumps({"machine": about, "results": numbers}, indent=1) + "\n")


if __name__ == "__main__":
    app()
