"""What a call costs the host: kernels that are launched, rounds of messages, milliseconds; plain and converted.

    python -m benchmarks.host --by-kernel --json host.json
    python -m benchmarks.host --no-links --by-rule    # of links that cost nothing; --compiled: as one graph
    PYTHONPATH=/path/to/older/checkout:$PWD python benchmarks/host/__main__.py    # the same of another commit

Nets of few channels, on images of one patch, so that kernels take next to nothing and what is left is the host's.
The rules choose as on a GPU, where each launch takes the host microseconds; the tensors are on this CPU. Ranks are
threads: milliseconds are CPU time of the rank's own thread, the least of the rounds, in which nothing waits. With
``--no-links`` there is one rank, of a group whose others do not exist (no_links.py), and all take turns.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import nn

import distpatch
from benchmarks._harness.crew import ROOT
from benchmarks._harness.printed import machine, markdown_table, said, wide_console
from benchmarks.host.by_function import milliseconds_by_function
from benchmarks.host.nets import NETS, Net
from benchmarks.host.no_links import rank_without_links
from tests.support.kernels import Kernels, take_sizes_of_gpus
from tests.support.threads import run_ranks

PLAIN, ALONE = "plain", "alone"
WARM_UP = 2

COMPILED = "compiled "
LEAST_SHOWN_MS = 0.02

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Cost:
    """Of one call, of the rank that launches most. ``kinds``: kernels by "torch function: operator"."""

    net: str
    who: str
    kernels: int
    rounds: int
    host_ms: float
    kinds: dict[str, int] = field(default_factory=dict)

    def most(self, place: int, count: int) -> str:
        """What launches most: torch functions (place 0) or operators (1)."""
        sums: Counter[str] = Counter()
        for kind, times in self.kinds.items():
            sums[kind.split(": ")[place]] += times
        return ", ".join(f"{name} {times}" for name, times in sums.most_common(count))


@torch.no_grad()
def measure(net: Net, model: Any, who: str, rounds: int) -> Cost:
    call = partial(net.call, model)
    for _ in range(WARM_UP):
        call()
    with Kernels() as kernels, distpatch.trace() as trace:
        call()
    seconds = [_cpu_seconds(call) for _ in range(rounds)]
    kinds = {f"{op}: {name}": times for (op, name), times in kernels.kinds.most_common()}
    return Cost(net.name, who, kernels.total, len(trace.records), 1e3 * min(seconds), kinds)


@torch.no_grad()
def without_links(net: Net, world: int, rounds: int, compiled: bool, by_rule: bool) -> tuple[list[Cost], Any]:
    """Plain, alone, and on so many ranks, round by round; eager, and compiled."""
    plain, shown = net.build(), None
    calls: dict[str, Callable[[], object]] = {PLAIN: partial(net.call, plain)}
    with rank_without_links(world) as pg:
        for who, group in ((ALONE, None), (f"{world} ranks", pg)):
            for name, whether in ((who, False), (COMPILED + who, True))[: 1 + compiled]:
                model = distpatch.convert_model(copy.deepcopy(plain), group, compile=whether)
                calls[name] = partial(net.call, model)
        if compiled:
            calls[COMPILED + PLAIN] = partial(net.call, _compiled(copy.deepcopy(plain)))
        least = dict.fromkeys(calls, math.inf)
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
        for _ in range(rounds):
            for name, call in calls.items():
                least[name] = min(least[name], _cpu_seconds(call))
        if by_rule:
            eager = {name: call for name, call in calls.items() if not name.startswith(COMPILED)}
            shown = table_of_functions(f"{net.name}: host ms by torch function, eager", eager, rounds)
    return [Cost(net.name, name, 0, 0, 1e3 * least[name]) for name in sorted(least, key=_place)], shown


def _place(name: str) -> tuple[bool, bool, bool]:
    return name.startswith(COMPILED), not name.endswith(PLAIN), not name.endswith(ALONE)


def _compiled(model: nn.Module) -> nn.Module:
    """Its entry point, as ``convert_model(compile=True)`` compiles it."""
    for name in ("forward", "decode"):
        if callable(entry := getattr(model, name, None)):
            setattr(model, name, torch.compile(entry, fullgraph=True, dynamic=False))
    return model


def table_of_functions(title: str, calls: dict[str, Callable[[], object]], rounds: int) -> Any:
    """A row a torch function that takes longer than in plain torch: milliseconds."""
    found = {name: milliseconds_by_function(calls[name], rounds) for name in sorted(calls, key=_place)}
    shown = markdown_table(title, "torch function", *found, "calls", "more than plain")
    (plain, _), (last, counts) = found[PLAIN], list(found.values())[-1]
    for name in sorted(last, key=lambda name: plain.get(name, 0.0) - last[name]):
        each, more = [f"{times.get(name, 0.0):.2f}" for times, _ in found.values()], last[name] - plain.get(name, 0.0)
        if more >= LEAST_SHOWN_MS:
            shown.add_row(name, *each, str(counts[name] or ""), f"{more:.2f}")
    return shown


def _cpu_seconds(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def costs(net: Net, worlds: list[int], rounds: int) -> list[Cost]:
    plain = net.build()
    found = [measure(net, plain, PLAIN, rounds)]

    def of_ranks(world: int) -> Cost:
        def rank_main(rank: int) -> Cost:
            model: nn.Module = copy.deepcopy(plain)
            distpatch.convert_model(model, dist.group.WORLD if world else None)
            return measure(net, model, f"{world} rank{'s' if world > 1 else ''}" if world else ALONE, rounds)

        ranks = run_ranks(max(world, 1), rank_main, timeout=120)
        return max(ranks, key=lambda cost: cost.kernels)

    return found + [of_ranks(world) for world in worlds]


def table_of_times(found: list[Cost]) -> Any:
    """Compiled calls over plain torch's compiled ones."""
    shown = markdown_table("one call, without links", "net", "", "host ms", "x plain", texts=2)
    times = {(cost.net, cost.who): cost.host_ms for cost in found}
    for cost in found:
        plain = times[cost.net, COMPILED + PLAIN if cost.who.startswith(COMPILED) else PLAIN]
        shown.add_row(cost.net, cost.who, f"{cost.host_ms:.2f}", f"{cost.host_ms / plain:.2f}")
    return shown


def table(found: list[Cost], by_kernel: bool) -> Any:
    headings = ("net", "", "kernels", "x plain", "rounds", "host ms", "x plain")
    shown = markdown_table("one call, the rank that launches most", *headings, texts=2)
    if by_kernel:
        shown.add_column("kernels by torch function; by operator")
    for cost in found:
        plain = next(other for other in found if (other.net, other.who) == (cost.net, PLAIN))
        row = [cost.net, cost.who, str(cost.kernels), f"{cost.kernels / plain.kernels:.2f}", str(cost.rounds)]
        row += [f"{cost.host_ms:.2f}", f"{cost.host_ms / plain.host_ms:.2f}"]
        shown.add_row(*row, *([f"{cost.most(0, 8)}; {cost.most(1, 12)}"] if by_kernel else []))
    return shown


@app.command()
def main(
    world: Annotated[
        list[int] | None,
        typer.Option(help="World sizes (0 1 2 4), 0 without a group; without links one (2)."),
    ] = None,
    net: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(net.name for net in NETS)}.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 5,
    by_kernel: Annotated[bool, typer.Option("--by-kernel", help="Also say which functions and operators.")] = False,
    no_links: Annotated[bool, typer.Option("--no-links", help="One rank, whose peers do not exist.")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also compiled; without links.")] = False,
    by_rule: Annotated[bool, typer.Option("--by-rule", help="Also by torch function; without links.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
) -> None:
    """Kernels, rounds and host time of a call, plain and converted."""
    torch.set_num_threads(1)
    take_sizes_of_gpus()
    chosen = [one for one in NETS if not net or one.name in net]
    console, about = wide_console(), machine()
    package = find_spec("distpatch")
    folder = Path(package.origin).parents[1] if package and package.origin else None
    console.print(said(about, *([str(folder)] if folder and folder != ROOT else [])))
    if no_links:
        found = []
        for one in chosen:
            costs_of_one, functions = without_links(one, max(world or [2]), rounds, compiled, by_rule)
            found += costs_of_one
            if functions is not None:
                console.print(functions)
        console.print(table_of_times(found))
    else:
        found = [cost for one in chosen for cost in costs(one, [0, 1, 2, 4] if world is None else world, rounds)]
        console.print(table(found, by_kernel))
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": about, "costs": [asdict(cost) for cost in found]}, indent=1) + "\n")


if __name__ == "__main__":
    app()
