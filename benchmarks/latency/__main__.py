"""What slow messages cost an exact decode: each round at its place, and as it is built.

    python -m benchmarks.latency --size 256 --delay-ms 5 --rounds 5

Stable Diffusion's decoder on 2 ranks of one thread, gloo; every message and collective takes longer by the delay. The
ways take turns. "Before": the moments of a norm and the halo of the convolution behind it are two rounds, and each halo
is waited for before anything is computed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks._harness.crew import Crew
from benchmarks._harness.printed import machine, markdown_table, said, wide_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Way:
    """How the decode is run, and what each run took on the slower rank."""

    name: str
    is_delayed: bool
    overlap: bool
    together: bool
    seconds: list[float] = field(default_factory=list)
    rounds: int = 0
    hidden: int = 0
    waited: list[float] = field(default_factory=list)


def ways() -> list[Way]:
    return [
        Way("no delay", False, True, True),
        Way("before", True, False, False),
        Way("moments with the halo", True, False, True),
        Way("that, and overlap", True, True, True),
    ]


def table(found: list[Way], delay_s: float) -> Any:
    headings = ("s", "excess s", "x before's", "rounds", "begun early", "waited s", "s / max(compute, delays)")
    shown = markdown_table("2 ranks, medians", "", *headings)
    compute, before = median(found[0].seconds), median(found[1].seconds)
    for way in found:
        seconds = median(way.seconds)
        row = [way.name, f"{seconds:.3f}"]
        if way.is_delayed:
            exposed = (way.rounds - way.hidden) * delay_s
            row += [f"{seconds - compute:.3f}", f"{(seconds - compute) / (before - compute):.2f}"]
            row += [str(way.rounds), str(way.hidden), f"{median(way.waited):.3f}"]
            row.append(f"{seconds / max(compute, exposed):.2f}")
        shown.add_row(*row)
    return shown


@app.command()
def main(
    size: Annotated[int, typer.Option(help="Pixels of a side.")] = 256,
    delay_ms: Annotated[float, typer.Option(help="By which every message takes longer.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
) -> None:
    """What slow messages cost an exact decode."""
    found, delay_s = ways(), delay_ms / 1e3
    with Crew("benchmarks.latency.worker", {"size": size}, 2, 1) as crew:

        def ask(way: Way) -> list[dict[str, Any]]:
            delay = delay_s if way.is_delayed else 0.0
            return crew.ask("decode", delay_s=delay, overlap=way.overlap, together=way.together)

        for way in found:
            ask(way)
        for _ in range(rounds):
            for way in found:
                answers = ask(way)
                way.seconds.append(max(answer["seconds"] for answer in answers))
                way.waited.append(max(answer["waited"] for answer in answers))
                way.rounds, way.hidden = answers[0]["rounds"], answers[0]["hidden"]
        error = max(answer["error"] for answer in crew.ask("compare"))
    console, about = wide_console(), machine()
    console.print(said(about, f"{size} x {size}", f"{delay_ms:g} ms on every message"))
    console.print(table(found, delay_s))
    console.print(f"largest difference between the last way and the one before: {error:.1e} of the largest value")
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": about, "ways": [asdict(way) for way in found]}, indent=1) + "\n")


if __name__ == "__main__":
    app()
