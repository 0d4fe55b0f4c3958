"""Nets of diffusers in their real depth, with few channels, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UNet2DConditionModel
from torch import nn

from tests.support.zoo.models import sd_decoder


@dataclass(frozen=True)
class Net:
    """``call``: one call of the model, plain or converted."""

    name: str
    make: Callable[[], nn.Module]
    call: Callable[[Any], object]

    def build(self) -> nn.Module:
        """The same weights every time."""
        torch.manual_seed(0)
        return self.make().eval().requires_grad_(False)


def sd_unet() -> nn.Module:
    """Stable Diffusion 1.5's."""
    return UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )


def wan_decoder() -> nn.Module:
    return AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


NETS = (
    Net("SD decode", lambda: sd_decoder((8, 8, 16, 16), 4), lambda model: model.decode(_normal(1, 4, 8, 4))),
    Net("SD U-Net step", sd_unet, lambda model: model(_normal(2, 4, 64, 8), 500, _normal(2, 7, 16))),
    Net("Wan decode", wan_decoder, lambda model: model.decode(_normal(1, 4, 2, 8, 4))),
)
