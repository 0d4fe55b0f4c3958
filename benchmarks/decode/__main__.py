"""Stable Diffusion's VAE decoder: one process against ranks, side by side.

    python -m benchmarks.decode --size 512 --rounds 7 --json decode.json

All contestants are started once and take turns (A B C A B C ...), one at a time, so that whatever else
the machine does falls on all alike: read the ratios of the rounds. Random weights, float32, on GPUs where there are
any. Memory is measured in passes of its own: live activations by counting tensors, the resident peak in a
fresh process.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress

from benchmarks._harness.crew import Crew
from benchmarks._harness.printed import machine, markdown_table, said, wide_console
from benchmarks._harness.resident import MIB, PROMPT_FREE

WORKER = "benchmarks.decode.worker"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Contestant:
    """How one decode is run."""

    name: str
    ranks: int = 1
    threads: int = 1
    converted: bool = False
    timed: bool = True


REFERENCE = Contestant("1 process, 2 threads", threads=2)
CONTESTANTS = (
    Contestant("1 process, 1 thread"),
    REFERENCE,
    Contestant("2 ranks, 1 thread each", ranks=2, converted=True),
    Contestant("4 ranks", ranks=4, converted=True, timed=False),
)
PATCH_CONV = Contestant("1 process, 2 threads, Patch Conv", threads=2, converted=True)
LEGEND = (
    f"time: median; x: median (range) of a round's time over that of {REFERENCE.name!r}; live, resident "
    "and sent: the rank with the most; error: largest, over the picture's largest value"
)


@dataclass
class Result:
    """What was measured of one contestant; of ranks, the worst."""

    contestant: Contestant
    size: int
    memory_format: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    live_bytes: int = 0
    live_op: str = ""
    resident_bytes: int = 0
    sent_bytes: int = 0
    messages: int = 0
    error: float = 0.0


class Bench:
    """All contestants at one size and memory format."""

    def __init__(
        self,
        contestants: tuple[Contestant, ...],
        size: int,
        memory_format: str,
        output: str,
        device: str | None,
        bar: Progress,
    ) -> None:
        self.config = {"size": size, "memory_format": memory_format, "output": output, "device": device}
        self.results = [Result(contestant, size, memory_format) for contestant in contestants]
        self.bar = bar

    def run(self, rounds: int) -> list[Result]:
        self._time(rounds)
        self._measure()
        return self.results

    def _crews(self, stack: ExitStack, results: list[Result], **env: str) -> list[Crew]:
        crews = []
        for contestant in (result.contestant for result in results):
            config = {**self.config, "ranks": contestant.ranks, "converted": contestant.converted}
            crew = Crew(WORKER, config, contestant.ranks, contestant.threads, **env)
            crews.append(stack.enter_context(crew))
        return crews

    def _time(self, rounds: int) -> None:
        """Those that this machine has the cores for, round by round."""
        timed = [result for result in self.results if result.contestant.timed]
        with ExitStack() as stack:
            crews = self._crews(stack, timed)
            for crew in crews:
                self._ask(crew, "warm_up")
            for _ in range(rounds):
                for result, crew in zip(timed, crews, strict=True):
                    answers = self._ask(crew, "time")
                    result.seconds.append(max(answer["seconds"] for answer in answers))
        reference = next(result for result in timed if result.contestant is REFERENCE)
        for result in timed:
            result.ratios = [a / b for a, b in zip(result.seconds, reference.seconds, strict=True)]

    def _measure(self) -> None:
        """Memory, traffic and exactness of all, in fresh processes; the reference goes first."""
        ordered = sorted(self.results, key=lambda result: result.contestant is not REFERENCE)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            picture = str(Path(folder) / "picture.pt")
            crews = self._crews(stack, ordered, **PROMPT_FREE)
            for result, crew in zip(ordered, crews, strict=True):
                answers = self._ask(crew, "resident")
                result.resident_bytes = max(answer["resident_bytes"] for answer in answers)
                answers = self._ask(crew, "live")
                worst = max(answers, key=lambda answer: answer["live_bytes"])
                result.live_bytes, result.live_op = worst["live_bytes"], worst["live_op"]
                result.sent_bytes = max(answer["sent_bytes"] for answer in answers)
                result.messages = max(answer["messages"] for answer in answers)
                if result.contestant is REFERENCE:
                    crew.ask("save", path=picture)
                result.error = max(answer["error"] for answer in crew.ask("compare", path=picture))

    def _ask(self, crew: Crew, order: str) -> list[dict[str, Any]]:
        answers = crew.ask(order)
        self.bar.advance(self.bar.task_ids[0])
        return answers


def orders_given(contestants: tuple[Contestant, ...], rounds: int) -> int:
    """How many passes one ``Bench`` makes, for the progress bar."""
    timed = sum(contestant.timed for contestant in contestants)
    return timed * (1 + rounds) + 2 * len(contestants)


def results_table(results: list[Result]) -> Any:
    """One line a contestant of one size and format."""
    side, layout = results[0].size, results[0].memory_format
    headings = ("contestant", "time s", "x", "live MiB", "resident +MiB", "sent MiB", "messages", "error")
    table = markdown_table(f"{side} x {side}, {layout}", *headings)
    for result in results:
        ratios = result.ratios
        table.add_row(
            result.contestant.name,
            f"{median(result.seconds):.2f}" if result.seconds else "",
            f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "",
            f"{result.live_bytes / MIB:.0f}",
            f"{result.resident_bytes / MIB:.0f}",
            f"{result.sent_bytes / MIB:.1f}" if result.messages else "",
            f"{result.messages}" if result.messages else "",
            f"{result.error:.0e}",
        )
    return table


@app.command()
def main(
    size: Annotated[
        list[int] | None, typer.Option(min=16, help="Side of the picture (512); give it several times.")
    ] = None,
    memory_format: Annotated[Literal["NCHW", "channels_last", "both"], typer.Option()] = "both",
    rounds: Annotated[int, typer.Option(min=1, help="How often each contestant is timed.")] = 5,
    output_layout: Annotated[
        Literal["gather", "shard", "rank0"], typer.Option(help="Who gets the picture of the ranks.")
    ] = "gather",
    patch_conv: Annotated[bool, typer.Option(help="Also one process, converted without a group.")] = False,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="GPUs where there are any, one a rank, if not given.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
) -> None:
    """Time and memory of decoding a random latent."""
    console = wide_console()
    contestants = (*CONTESTANTS, PATCH_CONV) if patch_conv else CONTESTANTS
    layouts = ("NCHW", "channels_last") if memory_format == "both" else (memory_format,)
    cells = list(product(size or [512], layouts))
    about = machine()
    console.print(said(about, f"{rounds} rounds"))
    results: list[Result] = []
    with Progress(console=console, transient=True) as bar:
        bar.add_task("decoding", total=len(cells) * orders_given(contestants, rounds))
        for side, layout in cells:
            measured = Bench(contestants, side, layout, output_layout, device, bar).run(rounds)
            console.print(results_table(measured))
            results += measured
    console.print(LEGEND)
    if json_file is not None:
        numbers = [asdict(result) for result in results]
        report = {"machine": about, "rounds": rounds, "output": output_layout, "results": numbers}
        json_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    app()
