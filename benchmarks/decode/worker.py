"""One rank of one contestant of ``benchmarks.decode``: builds the decoder, then measures what it is asked to."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import distpatch
from benchmarks._harness.crew import serve
from benchmarks._harness.decoder import FORMATS, build_decoder, draw_latents
from benchmarks._harness.resident import one_device, ready, reset_resident_peak, resident_peak
from distpatch import launch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Worker:
    """The orders that ``benchmarks.decode`` gives; each answers with a dict of numbers."""

    def __init__(self, vae: AutoencoderKL, latents: Tensor) -> None:
        self.vae = vae
        self.latents = latents
        self.device = latents.device
        self.picture: Tensor | None = None

    def _decode(self, latents: Tensor) -> Tensor:
        with torch.inference_mode():
            picture: Tensor = self.vae.decode(latents).sample
            return picture

    def warm_up(self) -> dict[str, Any]:
        self._decode(self.latents)
        return {}

    def time(self) -> dict[str, Any]:
        ready(self.device)
        started = time.perf_counter()
        self._decode(self.latents)
        ready(self.device)
        return {"seconds": time.perf_counter() - started}

    def live(self) -> dict[str, Any]:
        """Peak bytes of live activations, and what this rank sent."""
        with distpatch.LivePeak() as peak, distpatch.trace() as sent:
            self._decode(self.latents)
        return {
            "live_bytes": peak.peak_bytes,
            "live_op": peak.peak_op,
            "sent_bytes": sent.sent_bytes,
            "messages": sent.messages,
        }

    def resident(self) -> dict[str, Any]:
        """How far the first full decode raises the process's resident peak; of a GPU, the peak of its tensors."""
        self._decode(self.latents[..., :2, :])  # what a process needs once: threads, channels, kernels
        before = reset_resident_peak(self.device)
        self.picture = self._decode(self.latents)
        return {"resident_bytes": resident_peak(self.device) - before}

    def save(self, path: str) -> dict[str, Any]:
        """Write the picture that ``resident`` decoded."""
        torch.save(self.picture, path)
        return {}

    def compare(self, path: str) -> dict[str, Any]:
        """Largest difference of the picture that ``resident`` decoded from a saved one."""
        if self.picture is None:  # "rank0": it is not here
            return {"error": 0.0}
        picture = distpatch.gather(self.picture)
        saved = torch.load(path, map_location=self.device)
        difference = (picture - saved).abs().max() / saved.abs().max()
        return {"error": difference.item()}


def main(
    size: int, memory_format: str, threads: int, converted: bool, ranks: int, output: str, device: str | None
) -> None:
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # an error is then that of the ranks
    with ExitStack() as stack:
        vae, place = build_decoder(FORMATS[memory_format]), one_device(device)
        group = None
        if ranks > 1:
            group, place = stack.enter_context(launch.process_group(device=device, threads=threads))
        vae = vae.to(place)
        if converted:
            distpatch.convert_model(vae, group, output=output)
        worker = Worker(vae, draw_latents(size, FORMATS[memory_format]).to(place))
        orders = ("warm_up", "time", "live", "resident", "save", "compare")
        serve({name: getattr(worker, name) for name in orders})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # to take torch apart in order costs each process seconds, for nothing
