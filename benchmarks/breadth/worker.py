"""One rank of one contestant of ``benchmarks.breadth``: builds a net, then measures what it is asked to."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

import distpatch
from benchmarks._harness.crew import serve
from benchmarks._harness.resident import ready, reset_resident_peak, resident_peak
from benchmarks.breadth.nets import NETS
from distpatch import launch


class Worker:
    """The orders that ``benchmarks.breadth`` gives; each answers with a dict of numbers."""

    def __init__(self, name: str, net: nn.Module, inputs: list[Tensor]) -> None:
        self.net, self.inputs, self.call = net, inputs, NETS[name].call
        self.result: Tensor | None = None

    def _run(self) -> Tensor:
        with torch.inference_mode():
            result = self.call(self.net, *self.inputs)
        while not isinstance(result, Tensor):
            result = result[0]
        return result

    def time(self) -> dict[str, Any]:
        started = time.perf_counter()
        self.result = self._run()
        ready(self.result.device)
        return {"seconds": time.perf_counter() - started}

    def waits(self) -> dict[str, Any]:
        """Rounds of messages of a call, and the seconds that it waited for them, of how many."""
        with distpatch.trace() as seen:
            seconds = self.time()["seconds"]
        return {"rounds": seen.rounds, "waited": seen.wait_seconds, "seconds": seconds}

    def live(self) -> dict[str, Any]:
        """Peak bytes of live activations, and how many operations were gathered."""
        with distpatch.LivePeak() as peak, distpatch.trace() as seen:
            self._run()
        return {"live_bytes": peak.peak_bytes, "fallbacks": len(seen.fallbacks)}

    def whole(self) -> dict[str, Any]:
        """What ``policy="auto"`` says of a call that this rank computes whole; nothing of one that is sharded."""
        with distpatch.trace() as seen:
            self._run()
        return {"whole": [str(whole) for whole in seen.whole.values()]}

    def resident(self) -> dict[str, Any]:
        """How far the first run raises the process's resident peak."""
        before = reset_resident_peak(self.inputs[0].device)
        self.result = self._run()
        return {"resident_bytes": resident_peak(self.inputs[0].device) - before}

    def save(self, path: str) -> dict[str, Any]:
        torch.save(self.result, path)
        return {}

    def compare(self, path: str) -> dict[str, Any]:
        """Largest difference of the last result from a saved one, over the saved one's largest value."""
        saved, result = torch.load(path), self.result
        assert result is not None
        return {"error": ((result - saved).abs().max() / saved.abs().max()).item()}


def main(net: str, ranks: int, threads: int, shapes: list[list[int]] | None = None, policy: str = "shard") -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # of the libraries, while nets are built
    torch.manual_seed(0)
    model = NETS[net].build().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes or NETS[net].shapes]
    with ExitStack() as stack:
        if ranks > 1:
            group, _ = stack.enter_context(launch.process_group(device="cpu", threads=threads))
            distpatch.convert_model(model, group, policy=policy)
        worker = Worker(net, model, inputs)
        serve(
            {name: getattr(worker, name) for name in ("time", "waits", "whole", "live", "resident", "save", "compare")}
        )


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # to take torch apart in order costs each process seconds, for nothing
