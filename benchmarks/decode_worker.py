"""One rank of one contestant of ``decode.py``: builds the decoder, then measures what it is asked to."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from crew import serve
from torch import Tensor

import distpatch
from distpatch import launch
from distpatch.profiling.live_memory import LivePeak

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CHANNELS = (128, 256, 512, 512)  # Stable Diffusion's decoder, 50 million parameters
LATENT_CHANNELS = 4
PIXELS_PER_LATENT = 8
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def build_decoder(memory_format: torch.memory_format) -> AutoencoderKL:
    """The VAE with its decoder alone; the same random weights in every process."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=2,
        latent_channels=LATENT_CHANNELS,
    )
    vae.encoder = vae.quant_conv = None
    return vae.eval().requires_grad_(False).to(memory_format=memory_format)


def draw_latents(pixels: int, memory_format: torch.memory_format) -> Tensor:
    side = pixels // PIXELS_PER_LATENT
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, LATENT_CHANNELS, side, side, generator=generator)
    return latents.contiguous(memory_format=memory_format)


class Worker:
    """The orders that ``decode.py`` gives; each answers with a dict of numbers."""

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
        with LivePeak() as peak, distpatch.trace() as sent:
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


def one_device(wanted: str | None) -> torch.device:
    """That of a process without a group: the first GPU where there is one, or the CPU."""
    return torch.device("cuda:0" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def ready(device: torch.device) -> None:
    """The end of all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_peak(device: torch.device) -> int:
    """The process's largest resident size so far, in bytes; of a GPU, what tensors took there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def reset_resident_peak(device: torch.device) -> int:
    """Forget the resident peak so far; the new one (where Linux does not allow it, still the old one)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        print(f"the resident peak counts from the start of the process: {error}", file=sys.stderr)
    return resident_peak(device)


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
