"""The models that the tests run: small autoencoders of diffusers, and TAEF2 with its real weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel
from torch import Tensor, nn

import distpatch

TAEF2 = Path(__file__).parents[4] / "shared" / "data" / "taef2"


def tiny_kl(
    *, attention: bool = True, channels: tuple[int, ...] = (8, 8, 16, 16), dtype: torch.dtype = torch.float64
) -> AutoencoderKL:
    """Stable Diffusion's autoencoder with few channels; one level of 2× for each but the first."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        mid_block_add_attention=attention,
    )
    return vae.to(dtype).eval()


def sd_decoder(channels: tuple[int, ...] = (128, 256, 512, 512), groups: int = 32) -> AutoencoderKL:
    """Stable Diffusion's decoder, by default in its real size."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=groups,
    )
    vae.encoder = vae.quant_conv = None
    return vae.eval()


def tiny_unet(dtype: torch.dtype = torch.float64) -> UNet2DModel:
    torch.manual_seed(0)
    unet = UNet2DModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return unet.to(dtype).eval()


def tiny_autoencoder(dtype: torch.dtype = torch.float64) -> AutoencoderTiny:
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    return vae.to(dtype).eval()


def on_ranks(
    model: nn.Module, body: Callable[[Any, int], Any], group: Any = None, **options: Any
) -> Callable[[int], Any]:
    """The body of a rank that converts its own copy of the model: thread-ranks share memory."""

    def rank_main(rank: int) -> Any:
        converted = copy.deepcopy(model)
        options.setdefault("fallback", "error")
        distpatch.convert_model(converted, group or dist.group.WORLD, **options)
        return body(converted, rank)

    return rank_main


class Block(nn.Module):
    """Three 3×3 convolutions around a skip; in the mid blocks after a 1×1 branch with GroupNorm."""

    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv3(width, width), nn.ReLU(), conv3(width, width), nn.ReLU(), conv3(width, width))
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(inplace=True),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def conv3(width_in: int, width_out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1, **options)


class Taef2(nn.Module):
    """Tiny autoencoder for the latents of FLUX.2 (madebyollin/taef2, MIT): images in [0, 1], latents of
    32 channels and an eighth of the size."""

    def __init__(self) -> None:
        super().__init__()
        encoder: list[nn.Module] = [conv3(3, 64), Block(64, False)]
        for level in range(3):
            encoder += [conv3(64, 64, stride=2, bias=False), *(Block(64, level == 2) for _ in range(3))]
        decoder: list[nn.Module] = [Clamp(), conv3(32, 64), nn.ReLU()]
        for level in range(3):
            decoder += [Block(64, level == 0) for _ in range(3)]
            decoder += [nn.Upsample(scale_factor=2), conv3(64, 64, bias=False)]
        self.encoder = nn.Sequential(*encoder, conv3(64, 32))
        self.decoder = nn.Sequential(*decoder, Block(64, False), conv3(64, 3))

    @classmethod
    def pretrained(cls, folder: Path = TAEF2) -> Taef2:
        model = cls()
        for part in ("encoder", "decoder"):
            state = torch.load(folder / f"taef2_{part}.pth", weights_only=True, map_location="cpu")
            getattr(model, part).load_state_dict(state)
        return model.float().eval()

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
