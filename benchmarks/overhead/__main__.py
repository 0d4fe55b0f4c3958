"""What a sharded tensor costs an operation: microseconds over plain torch, beside DTensor.

    python -m benchmarks.overhead --json overhead.json
    torchrun --nproc_per_node=2 -m benchmarks.overhead     # with the exchange of real ranks

The tensors are tiny, (1, 4, 8, 8), so that the time is the bookkeeping's. The kinds of tensor take turns
round by round; an overhead is the median over the rounds of a round's difference from plain torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from rich.progress import Progress
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import distpatch
from benchmarks._harness.printed import machine, markdown_table, said, wide_console
from distpatch import launch

SHAPE = (1, 4, 8, 8)
PLAIN = "plain torch"
POINTWISE = ("relu", "silu", "x + y", "x * 2", "clamp")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Operands:
    """The same values as one kind of tensor; weights are replicated."""

    x: Tensor
    y: Tensor
    weight: Tensor
    scale: Tensor


OPERATIONS: dict[str, Callable[[Operands], Tensor]] = {
    "relu": lambda t: torch.relu(t.x),
    "silu": lambda t: F.silu(t.x),
    "x + y": lambda t: t.x + t.y,
    "x * 2": lambda t: t.x * 2,
    "clamp": lambda t: t.x.clamp(-1, 1),
    "x.shape": lambda t: t.x.shape,
    "conv2d 3x3": lambda t: F.conv2d(t.x, t.weight, padding=1),
    "group_norm": lambda t: F.group_norm(t.x, 2, t.scale, t.scale),
}


@dataclass
class Result:
    """One operation on one kind of tensor: its time, if it works, and what is wrong if it does not."""

    operation: str
    kind: str
    problem: str = ""
    microseconds: float | None = None
    over_plain: float | None = None


def operands(group: dist.ProcessGroup) -> dict[str, Operands]:
    """Plain, sharded by distpatch, and replicated and sharded by DTensor."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, *SHAPE, generator=generator)
    weight = torch.randn(SHAPE[1], SHAPE[1], 3, 3, generator=generator)
    scale = torch.ones(SHAPE[1])
    mesh = DeviceMesh.from_group(group, "cpu")

    def as_dtensor(placement: Placement) -> Operands:
        image = [distribute_tensor(t, mesh, [placement]) for t in (x, y)]
        return Operands(*image, *(distribute_tensor(t, mesh, [Replicate()]) for t in (weight, scale)))

    return {
        PLAIN: Operands(x, y, weight, scale),
        "PatchTensor": Operands(distpatch.shard(x, group), distpatch.shard(y, group), weight, scale),
        "DTensor Replicate": as_dtensor(Replicate()),
        "DTensor Shard(2)": as_dtensor(Shard(2)),
    }


def seconds_for(operation: Callable[[Operands], Tensor], given: Operands, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        operation(given)
    return time.perf_counter() - started


def problem(operation: Callable[[Operands], Tensor], given: Operands, expected: Tensor) -> str:
    """Why there is nothing to time: the call fails, or its values are not those of plain torch."""
    try:
        result = operation(given)
    except (RuntimeError, NotImplementedError):
        return "fails"
    if not isinstance(result, Tensor):
        return "" if result == expected else "wrong"
    whole = result.full_tensor() if isinstance(result, DTensor) else distpatch.gather(result)
    right = whole.shape == expected.shape and torch.allclose(whole, expected, atol=1e-5)
    return "" if right else "wrong"


def measure(
    operation: str, kinds: dict[str, Operands], rounds: int, calls: int, tick: Callable[[], None]
) -> list[Result]:
    """All kinds, round by round. Counts are fixed: all ranks must make the same calls."""
    run = OPERATIONS[operation]
    expected = run(kinds[PLAIN])
    results = [Result(operation, kind, problem(run, given, expected)) for kind, given in kinds.items()]
    able = {result.kind: kinds[result.kind] for result in results if result.problem != "fails"}
    for given in able.values():
        seconds_for(run, given, calls // 4 + 1)  # caches of plans and specs fill
    times: dict[str, list[float]] = {kind: [] for kind in able}
    for _ in range(rounds):
        for kind, given in able.items():
            times[kind].append(seconds_for(run, given, calls) / calls * 1e6)
        tick()
    for result in results:
        if result.kind in able:
            mine = times[result.kind]
            result.microseconds = median(mine)
            result.over_plain = median(a - b for a, b in zip(mine, times[PLAIN], strict=True))
    return results


def results_table(results: list[Result], title: str) -> Any:
    kinds = list(dict.fromkeys(result.kind for result in results))
    table = markdown_table(title, "operation", f"{PLAIN}, µs", *(f"{kind}, + µs" for kind in kinds[1:]))
    for operation in OPERATIONS:
        plain, *others = [result for result in results if result.operation == operation]
        over = (r.problem if r.over_plain is None else f"{r.problem} {r.over_plain:.1f}" for r in others)
        table.add_row(operation, f"{plain.microseconds:.1f}", *over)
    return table


@app.command()
@torch.no_grad()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each kind takes its turn.")] = 41,
    calls: Annotated[int, typer.Option(min=1, help="Calls of a turn.")] = 300,
    limit: Annotated[
        float | None,
        typer.Option(help="Fail if PatchTensor adds more µs than this to a pointwise operation."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
) -> None:
    """Overhead per operation of PatchTensor and DTensor."""
    results: list[Result] = []
    with launch.process_group(device="cpu", threads=1) as (group, _):
        console = wide_console(quiet=group.rank() != 0)
        kinds = operands(group)
        with Progress(console=console, disable=console.quiet, transient=True, refresh_per_second=1) as bar:
            task = bar.add_task("calling", total=len(OPERATIONS) * rounds)
            for operation in OPERATIONS:
                results += measure(operation, kinds, rounds, calls, lambda: bar.advance(task))
        about = machine()
        console.print(results_table(results, said(about, f"{group.size()} rank(s), no_grad")))
        if json_file is not None and group.rank() == 0:
            report = {"machine": about, "ranks": group.size(), "results": [asdict(r) for r in results]}
            json_file.write_text(json.dumps(report, indent=1) + "\n")
    if limit is not None:
        check(results, limit)


def check(results: list[Result], limit: float) -> None:
    """Fail where PatchTensor adds more to a pointwise operation than allowed."""
    slow = [
        f"{result.operation} {result.over_plain:.1f}"
        for result in results
        if result.kind == "PatchTensor" and result.operation in POINTWISE
        if result.over_plain is not None and result.over_plain > limit
    ]
    if slow:
        raise SystemExit(f"over the limit of {limit} µs: {', '.join(slow)}")


if __name__ == "__main__":
    app()
