"""What the meeting before each call costs: requests to the store, and time, by number of ranks."""

from __future__ import annotations

import multiprocessing
import statistics
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

import distpatch
from tests.support.meetings import milliseconds_of, requests_of

RANKS = (2, 8, 32)
CALLS, MEETINGS, ROUNDS = 20, 100, 5


@dataclass
class Cost:
    """Of one meeting. ``requests``: the most of any rank, by name; ``milliseconds``: the median round's."""

    ranks: int
    requests: dict[str, float]
    milliseconds: float


def measure() -> list[Cost]:
    """Processes on this host, which share its cores: of many ranks the time is that of the machine's turns."""
    return [_cost(size) for size in RANKS]


def table(costs: list[Cost]) -> str:
    lines = ["| ranks | requests a rank and call | ms a meeting |", "|---|---|---|"]
    for cost in costs:
        named = ", ".join(f"{name} {count:g}" for name, count in sorted(cost.requests.items()))
        total = sum(cost.requests.values())
        lines.append(f"| {cost.ranks} | {total:.2g} ({named}) | {cost.milliseconds:.2f} |")
    return "\n".join(lines)


def _cost(size: int) -> Cost:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.failures.rank"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_rank, args=(theirs, rank, size, store.port), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    answers = [mine.recv() for mine, _ in pipes]
    for process in processes:
        process.join()
    requests = max((count for count, _ in answers), key=lambda count: sum(count.values()))
    return Cost(size, requests, max(ms for _, ms in answers))


def _rank(pipe: Connection, rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    net: Any = distpatch.convert_model(torch.nn.Conv2d(1, 1, 3, padding=1), dist.group.WORLD)
    with torch.no_grad():
        image = torch.ones(1, 1, 2 * size, 4)
        for _ in range(3):
            net(image)
        requests = requests_of(lambda: net(image), CALLS)
    pipe.send((requests, statistics.median(milliseconds_of(MEETINGS) for _ in range(ROUNDS))))
    dist.barrier()
    dist.destroy_process_group()
