"""A decode that does not fit: plain, then by distpatch, both with the same address space.

    python -m tests.launch.limited_decode BUDGET_MIB PICTURE        # or by torchrun, on several ranks

The address space of each process ends so many MiB above what it has when the model is built and has run once on
a few rows (a budget of 0: no limit).
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

import distpatch
from distpatch import launch

MIB = 1 << 20
SPLITS = 16
CHANNELS, LATENT_SIDE = (32, 64), 240  # to 480 x 480: 56 MiB for 64 channels
# malloc gives freed memory back at once, and reserves no address space for each thread
PROMPT_FREE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def build() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    vae.encoder = vae.quant_conv = None
    return vae.eval().requires_grad_(False)


def draw() -> Tensor:
    return torch.randn(1, 4, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(1))


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    with torch.inference_mode():
        picture: Tensor = vae.decode(latents).sample
        return picture


def address_space() -> int:
    """What this process has now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


@contextmanager
def limited(address_space_bytes: int) -> Iterator[None]:
    """No more than so many bytes (0: any number), then no limit again."""
    if address_space_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main(budget_mib: int, path: str) -> None:
    torch.set_num_threads(1)
    with launch.process_group(device="cpu") as (group, _):
        vae, latents = build(), draw()
        over = group if group.size() > 1 else None
        few_rows = latents[:, :, :16].clone()
        decode(vae, few_rows)  # what a process needs once: kernels, libraries, the group's threads
        decode(distpatch.convert_model(vae, over, splits=SPLITS), few_rows)
        distpatch.restore_model(vae)
        limit = address_space() + budget_mib * MIB if budget_mib else 0
        try:
            with limited(limit):
                decode(vae, latents)
            print("plain: fits", flush=True)
        except RuntimeError as error:
            print(f"plain: {error}".splitlines()[0], flush=True)
        distpatch.convert_model(vae, over, splits=SPLITS)
        with limited(limit):
            picture = decode(vae, latents)
        print("distpatch: fits", flush=True)
        if group.rank() == 0:
            torch.save(picture, path)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
