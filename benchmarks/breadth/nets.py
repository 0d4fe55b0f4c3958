"""Nets of diffusers, transformers and monai, as their papers have them or narrower, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Net:
    """``call``: what is timed of a net, on inputs of these ``shapes``."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Any] = lambda net, *inputs: net(*inputs)


def diffusers(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        made: nn.Module = getattr(diffusers, name)(**config)
        return made

    return build


def monai(name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from monai.networks import nets

        made: nn.Module = getattr(nets, name)(*args, **options)
        return made

    return build


def transformers(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options))
        return made

    return build


class ResidualDense(nn.Module):
    """Real-ESRGAN's block: five convolutions, each of all maps before it."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        sizes = [(width + i * growth, growth if i < 4 else width) for i in range(5)]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for convolution in self.convolutions:
            maps.append(nn.functional.leaky_relu(convolution(torch.cat(maps, 1)), 0.2))
        return x + 0.2 * maps[-1]


class Upscaler(nn.Module):
    """Real-ESRGAN's net, with two blocks of its 69: four times the size, by nearest pixels."""

    def __init__(self, width: int = 64, growth: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualDense(width, growth) for _ in range(blocks)))
        self.ups = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.leave = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.enter(image))
        for up in self.ups:
            x = nn.functional.leaky_relu(up(nn.functional.interpolate(x, scale_factor=2)), 0.2)
        result: Tensor = self.leave(x)
        return result


def encoded(net: Any, x: Tensor) -> Any:
    return net.encode(x).latent_dist.mode()


def decoded(net: Any, z: Tensor) -> Any:
    return net.decode(z).sample


def denoised(net: Any, x: Tensor, *text: Tensor) -> Any:
    return net(x, 500, *text, return_dict=False)[0]


def logits(net: Any, x: Tensor) -> Any:
    return net(pixel_values=x).logits


KL = {
    "block_out_channels": (64, 128, 256, 256),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
WAN = {"base_dim": 48, "z_dim": 16, "num_res_blocks": 1}
HUNYUAN = {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 1}
LTX = {
    "block_out_channels": (64, 128, 256, 256),
    "decoder_block_out_channels": (64, 128, 256, 256),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "latent_channels": 32,
}
DC = {
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (64, 128, 256),
    "decoder_block_out_channels": (64, 128, 256),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "latent_channels": 8,
}
MIT = {"depths": [2, 2, 2, 2], "hidden_sizes": [32, 64, 160, 256], "num_attention_heads": [1, 2, 5, 8]}
DYNUNET = (3, 1, 3, [3, 3, 3, 3], [1, 2, 2, 2], [2, 2, 2])

NETS = {
    # autoencoders of images
    "KL encode": Net(diffusers("AutoencoderKL", **KL), ((1, 3, 384, 384),), encoded),
    "KL decode": Net(diffusers("AutoencoderKL", **KL), ((1, 4, 48, 48),), decoded),
    "tiny decode": Net(diffusers("AutoencoderTiny"), ((1, 4, 64, 64),), decoded),
    "DC decode": Net(diffusers("AutoencoderDC", **DC), ((1, 8, 64, 64),), decoded),
    "VQ decode": Net(
        diffusers("VQModel", **{**KL, "latent_channels": 3}), ((1, 3, 40, 40),), lambda net, z: net.decode(z).sample
    ),
    # of videos
    "Wan encode": Net(diffusers("AutoencoderKLWan", **WAN), ((1, 3, 5, 128, 224),), encoded),
    "Wan decode": Net(diffusers("AutoencoderKLWan", **WAN), ((1, 16, 2, 16, 28),), decoded),
    "HunyuanVideo decode": Net(diffusers("AutoencoderKLHunyuanVideo", **HUNYUAN), ((1, 16, 2, 16, 16),), decoded),
    "CogVideoX decode": Net(diffusers("AutoencoderKLCogVideoX", **HUNYUAN), ((1, 16, 2, 16, 16),), decoded),
    "LTX decode": Net(diffusers("AutoencoderKLLTXVideo", **LTX), ((1, 32, 2, 12, 12),), decoded),
    "Mochi decode": Net(
        diffusers(
            "AutoencoderKLMochi",
            decoder_block_out_channels=(32, 64, 128, 192),
            encoder_block_out_channels=(32, 64, 128, 192),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        ((1, 12, 2, 16, 16),),
        decoded,
    ),
    # denoising U-Nets and transformers
    "U-Net step": Net(
        diffusers(
            "UNet2DConditionModel",
            block_out_channels=(96, 192, 384, 384),
            layers_per_block=1,
            cross_attention_dim=256,
            norm_num_groups=32,
        ),
        ((2, 4, 64, 64), (2, 77, 256)),
        denoised,
    ),
    "U-Net step, 3-D": Net(
        diffusers(
            "UNet3DConditionModel",
            block_out_channels=(64, 128, 256, 256),
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=32,
        ),
        ((1, 4, 4, 32, 32), (1, 20, 128)),
        denoised,
    ),
    "pixel U-Net step": Net(
        diffusers(
            "UNet2DModel",
            block_out_channels=(64, 128, 128, 256),
            down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=32,
        ),
        ((1, 3, 192, 192),),
        denoised,
    ),
    # up-scalers and restoration
    "Real-ESRGAN": Net(Upscaler, ((1, 3, 80, 80),)),
    "Swin2SR": Net(
        transformers(
            "Swin2SRForImageSuperResolution",
            "Swin2SRConfig",
            embed_dim=60,
            depths=[2, 2],
            num_heads=[6, 6],
            image_size=128,
            window_size=8,
            upscale=2,
        ),
        ((1, 3, 128, 128),),
        lambda net, x: net(pixel_values=x).reconstruction,
    ),
    # segmentation of images
    "U-Net, batch norm": Net(
        monai("UNet", 2, 3, 4, (32, 64, 128, 256), (2, 2, 2), num_res_units=2, norm="batch"), ((1, 3, 384, 384),)
    ),
    "BasicUNet": Net(monai("BasicUNet", 2, 1, 2, features=(32, 32, 64, 128, 256, 32)), ((1, 1, 320, 320),)),
    "AttentionUnet": Net(monai("AttentionUnet", 2, 1, 2, (32, 64, 128), (2, 2)), ((1, 1, 320, 320),)),
    "SegFormer": Net(
        transformers("SegformerForSemanticSegmentation", "SegformerConfig", **MIT), ((1, 3, 512, 512),), logits
    ),
    "UNETR, 2-D": Net(
        monai("UNETR", 1, 2, (256, 256), feature_size=16, hidden_size=192, mlp_dim=768, num_heads=6, spatial_dims=2),
        ((1, 1, 256, 256),),
    ),
    # segmentation of volumes
    "SegResNet, 3-D": Net(monai("SegResNet", 3, 8, 1, 2), ((1, 1, 96, 96, 96),)),
    "DynUNet, 3-D": Net(monai("DynUNet", *DYNUNET, filters=[16, 32, 64, 128]), ((1, 1, 96, 96, 96),)),
    "U-Net, 3-D": Net(monai("UNet", 3, 1, 2, (16, 32, 64, 128), (2, 2, 2), num_res_units=2), ((1, 1, 96, 96, 96),)),
    "V-Net, 3-D": Net(monai("VNet", 3, 1, 2), ((1, 1, 64, 64, 64),)),
    "SwinUNETR, 3-D": Net(monai("SwinUNETR", 1, 2, feature_size=12), ((1, 1, 64, 64, 64),)),
}
