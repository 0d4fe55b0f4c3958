"""One rank of ``benchmarks.latency``: decodes with messages that take longer, in the ways that it is asked for."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import distpatch
from benchmarks._harness.crew import serve
from benchmarks._harness.decoder import build_decoder, draw_latents
from distpatch import launch
from tests.support.transports.delay import delayed


class Worker:
    """``models``: the decoder, converted with and without overlap."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents
        self.models = {overlap: build_decoder(torch.contiguous_format) for overlap in (True, False)}
        for overlap, vae in self.models.items():
            distpatch.convert_model(vae, dist.group.WORLD, overlap=overlap)
        self.pictures: dict[bool, Tensor] = {}

    @torch.inference_mode()
    def decode(self, delay_s: float, overlap: bool, together: bool) -> dict[str, Any]:
        """Seconds; rounds; how long was waited for them, and for how long what had begun was under way before that."""
        with ExitStack() as stack:
            stack.enter_context(delayed(delay_s, together))
            trace = stack.enter_context(distpatch.trace())
            dist.barrier()
            started = time.perf_counter()
            picture = self.models[overlap].decode(self.latents).sample
            seconds = time.perf_counter() - started
        self.pictures[overlap and together] = picture
        return {
            "seconds": seconds,
            "rounds": trace.rounds,
            "hidden": len(trace.waits),
            "waited": trace.wait_seconds,
            "behind": sum(wait.behind_s for wait in trace.waits),
        }

    def compare(self) -> dict[str, Any]:
        """The largest difference between the two ways."""
        one, other = self.pictures[True], self.pictures[False]
        return {"error": float((one - other).abs().max() / one.abs().max())}


def main(size: int, threads: int) -> None:
    with launch.process_group(device="cpu", threads=threads):
        worker = Worker(draw_latents(size, torch.contiguous_format))
        serve({name: getattr(worker, name) for name in ("decode", "compare")})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
