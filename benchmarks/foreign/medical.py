"""Nets of MONAI, small: of volumes, of pictures, and of pairs of volumes that are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.foreign.nets import Foreign

KL = {"channels": (8, 8, 16), "num_res_blocks": 1, "norm_num_groups": 4, "attention_levels": (False, False, True)}
STEP = {**KL, "in_channels": 1, "num_head_channels": 8, "include_fc": False}
TEXT = {"with_conditioning": True, "cross_attention_dim": 6}
CODER = {"channels": (4, 8, 16), "strides": (2, 2, 2)}
VQ = {
    "channels": (8, 8),
    "num_res_channels": (8, 8),
    "num_res_layers": 1,
    "downsample_parameters": ((2, 4, 1, 1),) * 2,
    "upsample_parameters": ((2, 4, 1, 1, 0),) * 2,
    "embedding_dim": 4,
}
VIT = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 3}
CONDITION = {"conditioning_embedding_num_channels": (8,), "conditioning_embedding_in_channels": 1}
BLOCKS = {"blocks_down": (1,) * 4, "blocks_up": (1,) * 4}

PICTURE, VOLUME, LABELS = (1, 1, 64, 32), (1, 1, 32, 16, 16), (1, 3, 64, 32)
LARGER, COLOURS = (1, 1, 48, 32, 32), (1, 3, 96, 64)
TIME = torch.tensor([7.0], dtype=torch.float64)


def denoised(net: Any, x: Tensor, *more: Tensor) -> Any:
    return net(x, TIME, *more)


def first(net: Any, x: Tensor) -> Any:
    return net(x)[0]


def encoded(net: Any, x: Tensor) -> Any:
    return net.encode(x)


def reconstructed(net: Any, x: Tensor) -> Any:
    return net.reconstruct(x)


def labelled(net: Any, x: Tensor, labels: Tensor) -> Any:
    return net.decode(net.encode(x)[0], labels)


def segmented(net: Any, x: Tensor) -> Any:
    """Without the random part."""
    deepest, skipped = net.encode(x)
    return net.decode(deepest, skipped[::-1])


def medical_nets() -> list[Foreign]:
    def net(kind: str, name: str, shapes: Any, *args: Any, call: Any = None, double: bool = True, **given: Any) -> None:
        def build() -> nn.Module:
            from monai.networks import nets

            made: nn.Module = getattr(nets, name)(*args, **given)
            return made

        calls: dict[str, Callable[..., Any]] = {} if call is None else {"call": call}
        found.append(Foreign("monai", f"{name}{kind and ', '}{kind}", build, tuple(shapes), **calls, double=double))

    found: list[Foreign] = []
    net("", "AHNet", [(1, 1, 128, 64)], spatial_dims=2, upsample_mode="bilinear")
    net("volumes", "AutoEncoder", [VOLUME], 3, 1, 2, **CODER)
    net("residual", "AutoEncoder", [PICTURE], 2, 1, 2, num_res_units=2, **CODER)
    net("dilated", "AutoEncoder", [PICTURE], 2, 1, 2, inter_channels=[8, 8], inter_dilations=[1, 2], **CODER)
    net("volumes", "AutoencoderKL", [VOLUME], 3, call=reconstructed, **KL)
    net("encoder", "AutoencoderKL", [PICTURE], 2, call=encoded, **KL)
    net("", "BasicUNetPlusPlus", [(2, 1, 37, 32)], 2, features=(8,) * 6)
    net("volumes", "BasicUNetPlusPlus", [(1, 1, 36, 16, 16)], 3, features=(4,) * 6)
    net("", "ControlNet", [PICTURE, PICTURE], 2, call=denoised, **CONDITION, **STEP)
    net("", "DenseNet121", [(1, 1, 96, 64)], 2, 1, 3)
    net("", "DiffusionModelUNet", [PICTURE], 2, call=denoised, out_channels=1, **STEP)
    net("volumes", "DiffusionModelUNet", [VOLUME], 3, call=denoised, out_channels=1, resblock_updown=True, **STEP)
    net("text", "DiffusionModelUNet", [PICTURE, (1, 5, 6)], 2, call=denoised, out_channels=1, **TEXT, **STEP)
    net("", "EfficientNetBN", [COLOURS], "efficientnet-b0", False, num_classes=3)
    net("", "FlexibleUNet", [COLOURS], 3, 2, "efficientnet-b0")
    net("ResNet", "FlexibleUNet", [COLOURS], 3, 2, "resnet18", upsample="deconv")
    net("", "GlobalNet", [VOLUME], [32, 16, 16], 3, 1, 4, 2, double=False)
    net("", "HighResNet", [(1, 1, 21, 10, 9)], 3)
    net("", "HoVerNet", [(1, 3, 256, 256)], out_classes=3)
    net("", "LocalNet", [VOLUME], 3, 1, 4, (0, 1, 2))
    net("", "MedNeXt", [VOLUME], 3, 4, kernel_size=3, **BLOCKS)
    net("response norm", "MedNeXt", [(1, 1, 96, 32)], 2, 4, kernel_size=5, global_resp_norm=True, deep_supervision=True)
    net("", "PatchDiscriminator", [(2, 1, 75, 64)], 2, 8, 1)
    net("", "MultiScalePatchDiscriminator", [(2, 1, 160, 128)], 2, 3, 2, 8, 1, minimum_size_im=128)
    net("", "Quicknat", [(1, 1, 48, 32)], num_classes=3, num_filters=8)
    net("", "RegUNet", [VOLUME], 3, 1, 4, 2)
    net("", "resnet18", [LARGER], n_input_channels=1, num_classes=3)
    net("", "ResNetFeatures", [LARGER], "resnet18", False, 3)
    net("", "SEResNet50", [COLOURS], spatial_dims=2, in_channels=3, num_classes=3)
    net("", "SEResNext50", [COLOURS], spatial_dims=2, in_channels=3, num_classes=3)
    net("", "SPADEAutoencoderKL", [PICTURE, LABELS], 2, 3, call=labelled, spade_intermediate_channels=8, **KL)
    net(
        "",
        "SPADEDiffusionModelUNet",
        [PICTURE, LABELS],
        2,
        call=denoised,
        out_channels=1,
        label_nc=3,
        spade_intermediate_channels=8,
        **STEP,
    )
    net("", "SPADENet", [LABELS], 2, 1, 1, 3, [64, 32], [4, 8, 8], is_vae=False, spade_intermediate_channels=8)
    net("", "SegResNetDS", [(1, 1, 48, 16, 16)], 3, 4, dsdepth=2)
    net("", "SegResNetDS2", [PICTURE], 2, 4)
    net("", "SegResNetVAE", [VOLUME], (32, 16, 16), call=segmented)
    net("", "VQVAE", [PICTURE], 2, 1, 1, double=False, **VQ)
    net("volumes", "VQVAE", [VOLUME], 3, 1, 1, double=False, **VQ)
    net("", "VarAutoEncoder", [PICTURE], 2, (1, 64, 32), 1, 4, (4, 8), (2, 2), call=first, use_mean_at_inference=True)
    net("", "ViTAutoEnc", [PICTURE], 1, (64, 32), 16, call=first, spatial_dims=2, **VIT)
    net("", "ViT", [VOLUME], 1, (32, 16, 16), 8, call=first, **VIT)
    net("", "VoxelMorph", [VOLUME, VOLUME], spatial_dims=3)
    return found
