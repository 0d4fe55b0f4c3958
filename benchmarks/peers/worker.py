"""One rank of one peer of ``benchmarks.peers``: builds the network, then measures what it is asked to.

Whatever a peer raises is an answer, not the end: the table shows it.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distpatch
from benchmarks._harness.crew import serve
from benchmarks._harness.decoder import FORMATS, build_decoder, draw_latents
from benchmarks._harness.resident import one_device, ready, reset_resident_peak, resident_peak
from benchmarks.peers import torchvision_names
from benchmarks.peers.contestants import RUNS, STACK_CHANNELS, Place, Run, Stack, plain
from distpatch import launch

assert torchvision_names
PATIENCE = timedelta(seconds=60)  # a peer whose ranks wait for each other has failed
PACKAGES = ("torch", "diffusers", "distvae", "patch_conv", "nvidia-physicsnemo", "distpatch")


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends and the calls that do it, seen at torch's dispatcher.

    An all_reduce is counted as a ring: 2 (n - 1) / n of its bytes; a gather as n - 1 times this rank's part.
    distpatch's own transfers happen inside of its operators, where no mode looks: ``distpatch.trace`` counts them.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.sent_bytes, self.calls = ranks, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if (
            namespace in {"c10d", "_c10d_functional"}
            and "recv" not in name
            and "wait" not in name
            and name != "barrier"
        ):
            self.calls += 1
            self.sent_bytes += self._sent(name, args)
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: Any) -> int:
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        sizes = [tensor.numel() * tensor.element_size() for tensor in given]
        if not sizes:
            return 0
        if name in {"allreduce_", "all_reduce"}:
            return sum(sizes) * 2 * (self.ranks - 1) // self.ranks
        if "gather" in name:  # output and input, in either order
            return min(sizes) * (self.ranks - 1)
        if "alltoall" in name or "all_to_all" in name:
            return sizes[-1] * (self.ranks - 1) // self.ranks
        return max(sizes)


class Worker:
    """The orders that ``benchmarks.peers`` gives; each answers with numbers, or with the peer's ``problem``."""

    def __init__(self, build: Callable[[], Run], exact: Callable[[], Tensor], given: Tensor, ranks: int) -> None:
        self.build, self.exact, self.given, self.ranks = build, exact, given, ranks
        self.run: Run | None = None
        self.problem = ""
        self.result: Tensor | None = None

    def _call(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.run is None:
                self.run = self.build()
            return self.run(x)

    def _answer(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if not self.problem:
            try:
                return measure()
            except Exception as error:  # whatever it is, it is the peer's
                lines = str(error).strip().splitlines() or [""]
                self.problem = f"{type(error).__name__}: {lines[0][:300]}"
        return {"problem": self.problem}

    def warm_up(self) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            self._call(self.given)
            return {}

        return self._answer(measure)

    def time(self) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            ready(self.given.device)
            started = time.perf_counter()
            self._call(self.given)
            ready(self.given.device)
            return {"seconds": time.perf_counter() - started}

        return self._answer(measure)

    def resident(self) -> dict[str, Any]:
        """How far the first full run raises the process's resident peak; a small one goes before."""

        def measure() -> dict[str, Any]:
            self._call(self.given[..., : 4 * self.ranks, :].contiguous())
            before = reset_resident_peak(self.given.device)
            self.result = self._call(self.given)
            return {"resident_bytes": resident_peak(self.given.device) - before}

        return self._answer(measure)

    def live(self) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            with distpatch.LivePeak() as peak:
                self._call(self.given)
            return {"live_bytes": peak.peak_bytes}

        return self._answer(measure)

    def traffic(self) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            with Traffic(self.ranks) as seen, distpatch.trace() as own:
                self._call(self.given)
            return {"sent_bytes": seen.sent_bytes + own.sent_bytes, "calls": seen.calls + len(own.records)}

        return self._answer(measure)

    def versions(self) -> dict[str, Any]:
        found = {}
        for name in PACKAGES:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {"versions": found}

    def save(self, path: str) -> dict[str, Any]:
        """The network's result in float64, for ``compare``; of the one process that is the reference."""
        with torch.no_grad():
            torch.save(self.exact(), path)
        return {}

    def compare(self, path: str) -> dict[str, Any]:
        """Largest difference of ``resident``'s result from a saved one, over the saved one's largest value."""

        def measure() -> dict[str, Any]:
            saved, result = torch.load(path, map_location=self.given.device), self.result
            assert result is not None
            if result.shape != saved.shape:
                raise ValueError(f"its result has shape {tuple(result.shape)}, not {tuple(saved.shape)}")
            return {"error": ((result - saved).abs().max() / saved.abs().max()).item()}

        return self._answer(measure)


def main(peer: str, workload: str, size: int, memory_format: str, ranks: int, threads: int, device: str | None) -> None:
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # as decode/worker.py
    layout = FORMATS[memory_format]
    with ExitStack() as stack:
        group, here = None, one_device(device)
        if ranks > 1:
            opened = launch.process_group(device=device, threads=threads, timeout=PATIENCE)
            group, here = stack.enter_context(opened)
        if workload == "decode":
            model, given = build_decoder(layout), draw_latents(size, layout)
        else:
            shape = (1, STACK_CHANNELS, size, size)
            given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
            model = Stack().to(memory_format=layout)
        model, given = model.to(here), given.to(here)

        def exact() -> Tensor:
            return plain(copy.deepcopy(model).double())(given.double())

        worker = Worker(lambda: RUNS[peer](model, Place(group, here, size)), exact, given, ranks)
        orders = ("warm_up", "time", "resident", "live", "traffic", "versions", "save", "compare")
        serve({name: getattr(worker, name) for name in orders})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as decode/worker.py
