"""Peak memory of one convolution and of Stable Diffusion's decoder: plain torch, the peers, distpatch.

    python -m benchmarks.memory --case conv --conv-size 1024 --rounds 5 --json memory.json --plot memory.png

Memory is measured in fresh processes, one contestant after the other: the resident peak (``VmHWM``) over
what was resident before the pass, the image included, with a malloc that returns freed memory at once, and
the peak of live tensors that the pass made. Time is measured without that malloc: all contestants that this
machine has the cores for are started once and take turns, so that whatever else the machine does falls on all
alike. Ratios are to plain torch in the same run. Random weights, float32, on the CPU; of ranks, the worst.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress

from benchmarks._harness.crew import Crew
from benchmarks._harness.printed import machine, markdown_table, said, wide_console
from benchmarks._harness.resident import MIB, PROMPT_FREE
from benchmarks.memory.worker import CONV_CHANNELS

WORKER = "benchmarks.memory.worker"
SIZES = {"conv": (1024, 2048), "decode": (512, 1024)}
# Channels of the largest activation at the full size: what the convolution reads, the last up-sampling writes.
CHANNELS = {"conv": CONV_CHANNELS, "decode": 256}
LEGEND = (
    "time: median; x: over plain torch, which has as many threads as all ranks together (time: median and range of "
    "the rounds); live, resident: MiB over what was there before, the rank with the most; error: largest, over the "
    "largest value. Ranks of one convolution have their rows of its input and keep those of its output; ranks of a "
    "decode have the whole latents and picture. Tiles are half the picture's side (at most 512), which is the "
    "largest size at which diffusers' tiling acts."
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Contestant:
    """How one case is run: by whom, on how many ranks, with what options."""

    name: str
    kind: str
    ranks: int = 1
    threads: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    timed: bool = True
    cases: tuple[str, ...] = ("conv", "decode")


def ours(splits: int | str, ranks: int = 1, lazy: bool = False) -> Contestant:
    """distpatch; more than two ranks are not timed: this is meant for two cores."""
    where = "" if ranks == 1 else f", {ranks} ranks"
    name = f"distpatch{where}, splits {splits}{', lazy' if lazy else ''}"
    threads = max(2 // ranks, 1)
    return Contestant(name, "distpatch", ranks, threads, {"splits": splits, "lazy": lazy}, timed=ranks <= 2)


PLAIN = Contestant("plain torch", "plain")
PEERS = (
    Contestant("patch_conv, splits 4", "patch_conv", options={"splits": 4}),
    Contestant("patch_conv, splits 16", "patch_conv", options={"splits": 16}),
    Contestant("diffusers tiling", "tiling", cases=("decode",)),
    Contestant("DistVAE 0.1.0, 2 ranks", "DistVAE", ranks=2, threads=1),
)
OURS = tuple(ours(splits) for splits in (1, 4, 16, "auto")) + tuple(ours("auto", ranks) for ranks in (2, 4))
LAZY = tuple(ours("auto", ranks, lazy=True) for ranks in (1, 2, 4))


@dataclass
class Result:
    """What was measured of one contestant; of ranks, the worst."""

    contestant: Contestant
    case: str
    size: int
    activation_bytes: int
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    live_bytes: int = 0
    live_op: str = ""
    resident_bytes: int = 0
    error: float = 0.0
    failure: str = ""


class Failed(Exception):
    """A contestant could not do what it was asked."""


class Bench:
    """All contestants of one case at one size; plain torch is the first."""

    def __init__(self, case: str, size: int, memory_format: str, contestants: list[Contestant], bar: Progress) -> None:
        self.config = {"case": case, "size": size, "memory_format": memory_format}
        activation_bytes = 4 * CHANNELS[case] * size * size
        self.results = [Result(contestant, case, size, activation_bytes) for contestant in contestants]
        self.bar = bar

    def run(self, rounds: int) -> list[Result]:
        self._measure()
        if rounds:
            self._time(rounds)
        return self.results

    def _crew(self, contestant: Contestant, stack: ExitStack, **env: str) -> Crew:
        config = {**self.config, "kind": contestant.kind, "ranks": contestant.ranks, "options": contestant.options}
        return stack.enter_context(Crew(WORKER, config, contestant.ranks, contestant.threads, **env))

    def _measure(self) -> None:
        """Memory and exactness, each contestant in fresh processes that end before the next."""
        with tempfile.TemporaryDirectory() as folder:
            reference = str(Path(folder) / "plain.pt")
            for result in self.results:
                with ExitStack() as stack:
                    crew = self._crew(result.contestant, stack, **PROMPT_FREE)
                    try:
                        self._measure_one(result, crew, reference)
                    except Failed as failed:
                        result.failure = str(failed)
                    self.bar.advance(self.bar.task_ids[0])

    def _measure_one(self, result: Result, crew: Crew, reference: str) -> None:
        result.resident_bytes = max(answer["resident_bytes"] for answer in ask(crew, "resident"))
        if result.contestant is PLAIN:
            ask(crew, "save", path=reference)
        result.error = max(answer["error"] for answer in ask(crew, "compare", path=reference))
        worst = max(ask(crew, "live"), key=lambda answer: answer["live_bytes"])
        result.live_bytes, result.live_op = worst["live_bytes"], worst["live_op"]

    def _time(self, rounds: int) -> None:
        """Those that did not fail before, round by round."""
        timed = [result for result in self.results if result.contestant.timed and not result.failure]
        with ExitStack() as stack:
            crews = [self._crew(result.contestant, stack) for result in timed]
            for number in range(1 + rounds):
                for result, crew in zip(timed, crews, strict=True):
                    self._time_one(result, crew, warm_up=number == 0)
        for result in timed:
            result.ratios = [a / b for a, b in zip(result.seconds, timed[0].seconds)]

    def _time_one(self, result: Result, crew: Crew, warm_up: bool) -> None:
        self.bar.advance(self.bar.task_ids[0])
        if result.failure:
            return
        try:
            seconds = max(answer["seconds"] for answer in ask(crew, "time"))
        except Failed as failed:
            result.failure = f"when timed: {failed}"
            return
        if not warm_up:
            result.seconds.append(seconds)


def ask(crew: Crew, order: str, **details: Any) -> list[dict[str, Any]]:
    """All ranks' answers; ``Failed`` with what the first rank that failed said, or how its process ended."""
    try:
        answers = crew.ask(order, **details)
    except (RuntimeError, BrokenPipeError) as error:
        raise Failed(str(error)) from error
    for answer in answers:
        if "failure" in answer:
            raise Failed(answer["failure"])
    return answers


def results_table(results: list[Result], memory_format: str) -> Any:
    """One line a contestant; the first is plain torch."""
    first = results[0]
    what = f"{CONV_CHANNELS} to {CONV_CHANNELS}, 3 x 3 convolution" if first.case == "conv" else "decode"
    headings = ("contestant", "time s", "x", "live MiB", "x", "resident +MiB", "x", "error")
    table = markdown_table(f"{what}, {first.size} x {first.size}, {memory_format}", *headings)
    for result in results:
        if result.failure:
            table.add_row(result.contestant.name, "failed")
            continue
        ratios = result.ratios
        table.add_row(
            result.contestant.name,
            f"{median(result.seconds):.2f}" if result.seconds else "",
            f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "",
            *_bytes(result.live_bytes, first.live_bytes),
            *_bytes(result.resident_bytes, first.resident_bytes),
            f"{result.error:.0e}",
        )
    return table


def _bytes(number: int, plain: int) -> tuple[str, str]:
    return f"{number / MIB:.0f}", f"{number / plain:.2f}" if plain else ""


@app.command()
def main(
    case: Annotated[Literal["conv", "decode", "both"], typer.Option(help="What is measured.")] = "both",
    conv_size: Annotated[list[int] | None, typer.Option(min=64, help="Sides of the convolution's image.")] = None,
    decode_size: Annotated[list[int] | None, typer.Option(min=64, help="Sides of the decoded picture.")] = None,
    memory_format: Annotated[Literal["NCHW", "channels_last"], typer.Option()] = "NCHW",
    rounds: Annotated[int, typer.Option(min=0, help="How often each is timed; 0: memory alone.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Contestants whose name contains this (and plain).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw peak memory over activation size.")] = None,
) -> None:
    """Peak memory and time, side by side."""
    console = wide_console()
    everyone = [PLAIN, *PEERS, *OURS, *LAZY]
    if only:
        everyone = [c for c in everyone if c is PLAIN or any(word in c.name for word in only)]
    sizes = {"conv": conv_size or SIZES["conv"], "decode": decode_size or SIZES["decode"]}
    cells = [(one, size) for one in ("conv", "decode") if case in (one, "both") for size in sizes[one]]
    about = machine()
    console.print(said(about, f"{rounds} rounds"))
    results: list[Result] = []
    with Progress(console=console, transient=True) as bar:
        passes = sum(
            1 + (1 + rounds) * (c.timed and rounds > 0) for one, _ in cells for c in everyone if one in c.cases
        )
        bar.add_task("measuring", total=passes)
        for one, size in cells:
            measured = Bench(one, size, memory_format, [c for c in everyone if one in c.cases], bar).run(rounds)
            console.print(results_table(measured, memory_format))
            for result in measured:
                if result.failure:
                    console.print(f"{result.contestant.name}: {result.failure}", markup=False, highlight=False)
            results += measured
            if json_file is not None:  # after each cell: what is done is kept
                numbers = [asdict(result) for result in results]
                report = {"machine": about, "rounds": rounds, "memory_format": memory_format, "results": numbers}
                json_file.write_text(json.dumps(report, indent=1) + "\n")
    console.print(LEGEND)
    if plot_file is not None:
        from benchmarks.memory.plot import draw

        draw(results, plot_file)


if __name__ == "__main__":
    app()
