"""One rank of ``benchmarks.messages``: messages and calls, with its threads scheduled as it is asked."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distpatch
from benchmarks._harness.crew import serve
from benchmarks.breadth.nets import NETS
from distpatch import launch

TURNS = 100  # messages of one measurement
MESSAGES = {"1 KiB": 256, "64 KiB": 16384}  # numbers of 4 bytes


def schedule(yields: bool, bound: bool) -> None:
    """gloo's threads of sockets under SCHED_BATCH or not; all threads on this rank's cores, or anywhere."""
    rank, ranks, cores = int(os.environ["LOCAL_RANK"]), dist.get_world_size(), os.cpu_count() or 1
    own = range(rank * cores // ranks, (rank + 1) * cores // ranks) if bound else range(cores)
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), own)
        if (thread / "comm").read_text().startswith("gloo_tcp_loop"):
            policy = os.SCHED_BATCH if yields else os.SCHED_OTHER
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))


class Worker:
    def __init__(self, names: list[str]) -> None:
        self.convolution = torch.nn.Conv2d(16, 16, 3)
        self.image = torch.randn(1, 16, 64, 64)
        self.calls = {name: self._call(name) for name in names}

    def _call(self, name: str) -> Callable[[], object]:
        torch.manual_seed(0)
        net = NETS[name]
        model = distpatch.convert_model(net.build().eval().requires_grad_(False), dist.group.WORLD)
        inputs = [torch.randn(shape) for shape in net.shapes]
        return lambda: net.call(model, *inputs)

    @torch.inference_mode()
    def run(self, yields: bool, bound: bool) -> dict[str, Any]:
        """Microseconds that a message to the next rank and one of the last take, after a convolution; ms of calls."""
        schedule(yields, bound)
        answer: dict[str, Any] = {}
        for label, numbers in MESSAGES.items():
            dist.barrier()
            answer[label] = 1e6 * sum(self._message(numbers) for _ in range(TURNS)) / TURNS
        for name, call in self.calls.items():
            dist.barrier()
            started = time.perf_counter()
            call()
            answer[name] = 1e3 * (time.perf_counter() - started)
        return answer

    def _message(self, numbers: int) -> float:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        outgoing, incoming = torch.ones(numbers), torch.empty(numbers)
        self.convolution(self.image)
        started = time.perf_counter()
        works = [dist.irecv(incoming, (rank - 1) % ranks), dist.isend(outgoing, (rank + 1) % ranks)]
        for work in works:
            work.wait()  # type: ignore[union-attr]
        return time.perf_counter() - started


def main(names: list[str], threads: int) -> None:
    warnings.simplefilter("ignore")  # of the libraries, while nets are built
    with launch.process_group(device="cpu", threads=threads, bind=False):
        serve({"run": Worker(names).run})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
