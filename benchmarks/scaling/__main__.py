"""Stable Diffusion's VAE decoder on 1, 2, 4 ... ranks: what was planned, and what was measured.

    python -m benchmarks.scaling --size 512 --json scaling.json --plot docs/scaling.png

Each world size runs by itself, one thread a rank (one GPU a rank where there are enough), with random weights in
float32. Planned numbers come from fake tensors alone, before anything runs. On a CPU with fewer cores than ranks
the ranks take turns, and the wall clock says nothing of their speed: what is compared is the CPU time of a rank.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

import distpatch
from benchmarks._harness.crew import Crew
from benchmarks._harness.decoder import FORMATS, build_decoder, draw_latents
from benchmarks._harness.plots import OTHERS, drawing
from benchmarks._harness.printed import machine, markdown_table, said, wide_console

WORKER = "benchmarks.scaling.worker"
MIB = 1 << 20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Measured:
    """Of one world size; bytes, messages, FLOPs and CPU seconds of the rank that has most of each."""

    world_size: int
    device: str
    seconds: float
    cpu_seconds: float
    cpu_seconds_in_all: float
    live_bytes: int
    sent_bytes: int
    messages: int
    flops: int


def run(world_size: int, size: int, rounds: int) -> Measured:
    """Decode on so many processes, each with one thread, or one GPU where there are as many."""
    device = "cuda" if torch.cuda.device_count() >= world_size else "cpu"
    with Crew(WORKER, {"size": size, "ranks": world_size, "device": device}, world_size, 1) as crew:
        crew.ask("warm_up")
        timed = [crew.ask("time") for _ in range(rounds)]
        seen = crew.ask("measure")
    return Measured(
        world_size,
        device,
        median(max(answer["seconds"] for answer in answers) for answers in timed),
        median(max(answer["cpu_seconds"] for answer in answers) for answers in timed),
        median(sum(answer["cpu_seconds"] for answer in answers) for answers in timed),
        *(max(answer[key] for answer in seen) for key in ("peak_bytes", "sent_bytes", "messages", "flops")),
    )


def table(measured: dict[int, Measured], plans: distpatch.Scaling) -> Any:
    headings = ("ranks", "activations MiB", "sent MiB", "messages", "GFLOPs", "CPU s a rank", "CPU s in all", "wall s")
    found = markdown_table("planned / measured, the rank that has most", *headings, texts=0)
    for plan in plans:
        real = measured.get(plan.world_size)
        flops = max(rank.flops for rank in plan.ranks)
        compute = plan.compute_seconds_of(plan.busiest)

        def pair(planned: str, seen: str | None) -> str:
            return planned if seen is None else f"{planned} / {seen}"

        found.add_row(
            str(plan.world_size),
            pair(f"{plan.peak_bytes / MIB:.1f}", f"{real.live_bytes / MIB:.1f}" if real else None),
            pair(f"{plan.sent_bytes / MIB:.3f}", f"{real.sent_bytes / MIB:.3f}" if real else None),
            pair(f"{plan.messages:,}", f"{real.messages:,}" if real else None),
            pair(f"{flops / 1e9:.1f}", f"{real.flops / 1e9:.1f}" if real else None),
            pair("" if compute is None else f"{compute:.2f}", f"{real.cpu_seconds:.2f}" if real else None),
            f"{real.cpu_seconds_in_all:.2f}" if real else "",
            f"{real.seconds:.2f}" if real else "",
        )
    return found


def plot(path: Path, measured: dict[int, Measured], plans: distpatch.Scaling, title: str) -> None:
    sizes = [plan.world_size for plan in plans]
    real = [measured[size] for size in sizes if size in measured]
    where = [one.world_size for one in real]
    compute = [plan.compute_seconds_of(plan.busiest) or 0.0 for plan in plans]
    panels: list[tuple[str, list[float], list[float]]] = [
        (
            "activations a rank, MiB",
            [plan.peak_bytes / MIB for plan in plans],
            [one.live_bytes / MIB for one in real],
        ),
        (
            "sent by a rank, MiB",
            [plan.sent_bytes / MIB for plan in plans],
            [one.sent_bytes / MIB for one in real],
        ),
        (
            f"{'CPU ' if real[0].device == 'cpu' else ''}time of a rank, s",
            compute,
            [one.cpu_seconds if one.device == "cpu" else one.seconds for one in real],
        ),
    ]
    with drawing(path, 12, 3.8, title) as figure:
        for axes, (label, planned, seen) in zip(figure.subplots(1, 3), panels, strict=True):
            axes.plot(sizes, planned, "-", label="planned")
            axes.plot(where, seen, "o", label="measured")
            if planned[0] > 0:
                axes.plot(sizes, [planned[0] / size for size in sizes], color=OTHERS, lw=0.8, ls=":", label="1/N")
            axes.set(xlabel="ranks", title=label, xscale="log", yscale="log" if planned[0] > 0 else "linear")
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.legend()


@app.command()
def main(
    size: Annotated[int, typer.Option(min=16, help="Side of the picture.")] = 512,
    world: Annotated[list[int] | None, typer.Option(help="World sizes to measure (1, 2, 4, 8).")] = None,
    most: Annotated[int, typer.Option(min=1, help="Plan for 1, 2, 4 ... ranks up to here.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="How often each world size is timed.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw them here.")] = None,
) -> None:
    """Memory, traffic and work of a rank against the number of ranks, planned and measured."""
    console = wide_console()
    about: dict[str, Any] = machine()
    console.print(said(about, f"{size} x {size}, float32"))
    worlds = sorted(set(world or [1, 2, 4, 8]))
    planned = sorted({*worlds, *(1 << n for n in range(most.bit_length()))})
    torch.set_num_threads(1)
    place = "cuda" if torch.cuda.device_count() >= max(worlds) else "cpu"
    device, _ = distpatch.calibrate(device=place)
    console.print(
        f"{device.name}: {device.flops['float32'] / 1e9:.0f} GFLOP/s (convolution, float32), "
        f"{device.bandwidth / 1e9:.0f} GB/s"
    )
    measured: dict[int, Measured] = {}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("planning", total=1 + len(worlds))
        latents = draw_latents(size, FORMATS["NCHW"])
        plans = distpatch.scaling(
            build_decoder(FORMATS["NCHW"]), latents, world_sizes=planned, method="decode", device=device
        )
        bar.advance(task)
        for ranks in worlds:
            bar.update(task, description=f"{ranks} ranks")
            measured[ranks] = run(ranks, size, rounds)
            bar.advance(task)
    console.print(table(measured, plans))
    if json_file is not None:
        report = {
            "machine": about,
            "size": size,
            "rounds": rounds,
            "measured": [asdict(one) for one in measured.values()],
            "planned": [plan.to_dict() for plan in plans],
        }
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if picture is not None:
        plot(picture, measured, plans, f"Stable Diffusion's decoder, {size} x {size}, {about['cpu']}")


if __name__ == "__main__":
    app()
