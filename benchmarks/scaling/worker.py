"""One rank of ``benchmarks.scaling``: builds the decoder, then decodes and measures."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch

import distpatch
from benchmarks._harness.crew import serve
from benchmarks._harness.decoder import FORMATS, build_decoder, draw_latents
from distpatch import launch


def main(size: int, threads: int, ranks: int, device: str) -> None:
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        group, place = stack.enter_context(launch.process_group(device=device, threads=threads))
        vae = distpatch.convert_model(build_decoder(FORMATS["NCHW"]).to(place), group, fallback="error")
        latents = draw_latents(size, FORMATS["NCHW"]).to(place)

        def decode() -> None:
            with torch.no_grad():
                vae.decode(latents)
                if place.type == "cuda":
                    torch.cuda.synchronize(place)

        def warm_up() -> dict[str, Any]:
            decode()
            return {}

        def run() -> dict[str, Any]:
            wall, cpu = time.perf_counter(), time.process_time()
            decode()
            return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}

        def measure() -> dict[str, Any]:
            with distpatch.trace(measure=True) as t:
                decode()
            return t.to_dict()

        serve({"warm_up": warm_up, "time": run, "measure": measure})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as decode/worker.py
