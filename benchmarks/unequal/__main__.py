"""Two ranks of one thread, one of them slowed on purpose: how should rows be shared, and does ``weights`` find it?

    python -m benchmarks.unequal --rounds 5 --net "KL decode" --json unequal.json

The slow rank runs every kernel of torch ``--times`` times. Splits take turns within a round; read the minimum over the
rounds. ``given``: the proportion that is known; ``measured``: ``convert_model(weights="measured")``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks._harness.crew import Crew
from benchmarks._harness.printed import machine, markdown_table, said, wide_console
from benchmarks.breadth.nets import NETS

WORKER = "benchmarks.unequal.worker"
SHARES = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each split is timed.")] = 5,
    net: Annotated[str, typer.Option(help="A net of benchmarks.breadth.")] = "KL decode",
    times: Annotated[int, typer.Option(min=1, help="How slow rank 1 is.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
) -> None:
    """How near is what ``weights`` finds to the best split?"""
    console, about = wide_console(), machine()
    console.print(said(about, f"{rounds} rounds"))
    splits: dict[str, Any] = {f"{share:.2f}": (share, 1 - share) for share in SHARES}
    splits |= {"even": None, "given": (times, 1), "measured": "measured"}
    with Crew(WORKER, {"net": net, "slow_rank": 1, "times": times}, 2, 1) as crew:
        for name, weights in splits.items():
            crew.ask("convert", name=name, weights=weights)
        shares: dict[str, float] = {}
        seconds: dict[str, list[float]] = {name: [] for name in splits}
        for _ in range(rounds + 1):
            for name in splits:
                answers = crew.ask("time", name=name)
                seconds[name].append(max(answer["seconds"] for answer in answers))
                shares[name] = answers[0]["share"]
    fastest = {name: min(each[1:]) for name, each in seconds.items()}  # the first calls load kernels and make plans
    best = min((f"{share:.2f}" for share in SHARES), key=fastest.__getitem__)
    title = f"{net} {NETS[net].shapes}, two ranks of one thread, rank 1 runs every kernel {times} times"
    shown = markdown_table(title, "split", "rank 0's share", "s, least of the rounds", "x the best of the grid")
    for name, least in fastest.items():
        shown.add_row(name, f"{shares[name]:.3f}", f"{least:.4f}", f"{least / fastest[best]:.2f}")
    console.print(shown)
    if json_file is not None:
        numbers = {"net": net, "times": times, "shares": shares, "seconds": seconds}
        json_file.write_text(json.dumps({"machine": about, **numbers}, indent=1) + "\n")


if __name__ == "__main__":
    app()
