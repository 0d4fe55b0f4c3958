"""Stable Diffusion's decoder with random weights, and latents for it: the same in every process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
