"""One rank of ``benchmarks.unequal``: the same net converted in several ways, timed in turns."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import distpatch
from benchmarks._harness.crew import serve
from benchmarks.breadth.nets import NETS
from distpatch import launch


class Slowed(TorchDispatchMode):
    """Runs every kernel of torch that makes something new so many times. What writes to its operands runs once."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        makes_new = func.namespace == "aten" and not schema.is_mutable
        if makes_new and all(returned.alias_info is None for returned in schema.returns):
            for _ in range(self.times - 1):
                func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Worker:
    """The orders that ``benchmarks.unequal`` gives."""

    def __init__(self, net: str, model: nn.Module, inputs: list[Tensor]) -> None:
        self.model, self.inputs, self.call = model, inputs, NETS[net].call
        self.converted: dict[str, nn.Module] = {}

    def convert(self, name: str, weights: Any) -> dict[str, Any]:
        """Convert another copy of the net."""
        model = copy.deepcopy(self.model)
        self.converted[name] = distpatch.convert_model(model, dist.group.WORLD, weights=weights, output="shard")
        return {}

    def time(self, name: str) -> dict[str, Any]:
        """One call: the slowest rank's time counts. ``share``: of the result's rows, what rank 0 has."""
        started = time.perf_counter()
        with torch.inference_mode():
            result = self.call(self.converted[name], *self.inputs)
        seconds = time.perf_counter() - started
        while not isinstance(result, Tensor):
            result = result[0]
        assert isinstance(result, distpatch.PatchTensor)
        return {"seconds": seconds, "share": result.row_layout.heights[0] / result.row_layout.size}


def main(net: str, threads: int, slow_rank: int, times: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # of the libraries, while nets are built
    torch.manual_seed(0)
    model = NETS[net].build().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator) for shape in NETS[net].shapes]
    with launch.process_group(device="cpu", threads=threads), Slowed(times if dist.get_rank() == slow_rank else 1):
        worker = Worker(net, model, inputs)
        serve({"convert": worker.convert, "time": worker.time})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # to take torch apart in order costs each process seconds, for nothing
