"""``distpatch bench``: time, memory and traffic of a model on the ranks that run it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from rich.table import Table
from torch import Tensor, nn

import distpatch
from distpatch import launch
from distpatch.cli import options as o
from distpatch.cli.autoencoder import check_input, decoded, encoded, stable_diffusion
from distpatch.cli.models import locate
from distpatch.cli.session import Session, first, parse_shape, session
from distpatch.cli.work import Call
from distpatch.profiling.live_memory import MIB, LivePeak

CALLS: dict[str, Call] = {"decode": decoded, "encode": encoded}


@dataclass
class Cost:
    """What one rank spent; times are those of every round, ``live_bytes`` the peak of live activations."""

    seconds: list[float]
    live_bytes: int
    cuda_bytes: int
    sent_bytes: int
    messages: int


def bench(
    model: Annotated[
        Path | None,
        typer.Argument(help="Folder or hub id of an autoencoder of diffusers; Stable Diffusion's, random, if none."),
    ] = None,
    shape: o.ShapeOption = "1,4,64,64",
    method: Annotated[Literal["decode", "encode"], typer.Option(help="What is timed.")] = "decode",
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls, after one to warm up.")] = 3,
    alone: Annotated[bool, typer.Option("--alone", help="Time rank 0 alone too, and compare.")] = False,
    dtype: o.DtypeOption = "float32",
    device: o.DeviceOption = None,
    threads: o.ThreadsOption = None,
    timeout: o.TimeoutOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Time a model on random input: seconds, live activations, bytes and messages of each rank.

    Examples:

        distpatch bench --shape 1,4,32,32

        torchrun --nproc_per_node=8 -m distpatch bench vae/ --shape 1,16,21,90,160 --dtype bfloat16 --alone --json
    """
    size = parse_shape(shape)
    with session(as_json=as_json, device=device, threads=threads, timeout=timeout) as here:
        precision = getattr(torch, dtype)

        def load() -> nn.Module:
            loaded = locate(model).with_weights(precision) if model else stable_diffusion(precision)
            check_input(loaded, method, size, f"--shape {shape}")
            return loaded

        vae = first(here, load)
        vae = vae.to(here.device)
        given = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(here.device, precision)
        call = CALLS[method]
        distpatch.convert_model(vae, here.group)
        result, cost = measure(here, vae, call, given, rounds)
        distpatch.restore_model(vae)
        costs: list[Any] = [None] * here.group.size()
        dist.all_gather_object(costs, asdict(cost), group=here.group)
        numbers: dict[str, Any] = {"command": "bench", "method": method, "shape": list(size), "dtype": dtype}
        numbers |= {**here.where(), "rounds": rounds, "each_rank": costs}
        if alone:
            single = launch.on_rank0(here.group, lambda: measure(here, vae, call, given, rounds, together=False))
            if single is not None:
                numbers["alone"] = asdict(single[1])
                numbers["error"] = ((result - single[0]).abs().max() / single[0].abs().max()).item()
        here.report(numbers, table(numbers))


def measure(
    here: Session, model: nn.Module, call: Call, given: Tensor, rounds: int, *, together: bool = True
) -> tuple[Tensor, Cost]:
    """A call to warm up, the timed ones, and one for memory and traffic. ``together``: on all ranks."""

    def ready() -> None:
        if here.device.type == "cuda":
            torch.cuda.synchronize(here.device)
        if together:
            dist.barrier(here.group)

    seconds = []
    with torch.inference_mode(), here.progress(model, "all ranks" if together else "rank 0 alone"):
        result = call(model, given)
        for _ in range(rounds):
            ready()
            started = time.perf_counter()
            result = call(model, given)
            ready()
            seconds.append(time.perf_counter() - started)
        if here.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(here.device)
            before = torch.cuda.memory_allocated(here.device)
            call(model, given)
            cuda_bytes = torch.cuda.max_memory_allocated(here.device) - before
        else:
            cuda_bytes = 0
        with LivePeak() as live, distpatch.trace() as sent:
            call(model, given)
    return result, Cost(seconds, live.peak_bytes, cuda_bytes, sent.sent_bytes, sent.messages)


def table(numbers: dict[str, Any]) -> Table:
    title = f"{numbers['method']} of {numbers['shape']}, {numbers['dtype']}, {numbers['device']}, {numbers['torch']}"
    lines = Table(title=title, title_justify="left")
    lines.add_column("")
    for heading in ("seconds", "range", "live MiB", "sent MiB", "messages"):
        lines.add_column(heading, justify="right")
    rows = [(f"rank {rank}", cost) for rank, cost in enumerate(numbers["each_rank"])]
    if "alone" in numbers:
        rows.append(("rank 0 alone", numbers["alone"]))
    for name, cost in rows:
        times = cost["seconds"]
        lines.add_row(
            name,
            f"{median(times):.3f}",
            f"{min(times):.3f}-{max(times):.3f}",
            f"{cost['live_bytes'] / MIB:.1f}",
            f"{cost['sent_bytes'] / MIB:.2f}",
            str(cost["messages"]),
        )
    if "alone" in numbers:
        slowest = max(median(cost["seconds"]) for cost in numbers["each_rank"])
        faster = median(numbers["alone"]["seconds"]) / slowest
        lines.caption = f"{faster:.2f} times as fast as rank 0 alone; largest difference {numbers['error']:.1e}"
    return lines
