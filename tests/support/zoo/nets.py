"""Nets of libraries, as they are, small and with random weights: U-Nets. Each with the oddest sizes that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Net:
    """``inputs``: shapes, or tensors that are passed as they are; ``call``: the outputs to be compared.

    ``double``: the net computes some steps in fp32, whatever its dtype, which the test lifts to fp64.
    """

    library: str
    build: Callable[[], nn.Module]
    inputs: tuple[Shape | Tensor, ...]
    call: Callable[..., Any] = lambda model, *inputs: model(*inputs)
    fallbacks: tuple[str, ...] = ()
    dim: int = -2
    train: bool = False
    double: bool = False


def monai(name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("monai.networks.nets"), name)(*args, **options)


def diffusers(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("diffusers"), name)(**options)


def sample(model: Any, *inputs: Tensor) -> Tensor:
    return model(*inputs, return_dict=False)[0]


TIMES = torch.tensor([3, 7])
CONDITIONED = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 6,
}

# What is convolved, normalised, pooled and resized; some with attention in the middle.
UNETS = {
    "UNet, instance norm": Net("monai", monai("UNet", 2, 1, 2, (4, 8, 8), (2, 2), num_res_units=1), ((2, 1, 20, 12),)),
    "UNet, batch norm in training": Net(
        "monai",
        monai("UNet", 2, 1, 2, (4, 8, 8), (2, 2), num_res_units=1, norm="batch"),
        ((2, 1, 20, 12),),
        train=True,
    ),
    "UNet, 3-D, by depth": Net("monai", monai("UNet", 3, 1, 2, (4, 8), (2,)), ((1, 1, 10, 6, 6),), dim=-3),
    "UNet, 3-D, by height": Net("monai", monai("UNet", 3, 1, 2, (4, 8), (2,)), ((1, 1, 6, 10, 6),)),
    "BasicUNet": Net("monai", monai("BasicUNet", 2, 1, 2, features=(4, 4, 8, 8, 8, 4)), ((1, 1, 37, 33),)),
    "SegResNet": Net("monai", monai("SegResNet", 2, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)), ((1, 1, 28, 12),)),
    "AttentionUnet": Net("monai", monai("AttentionUnet", 2, 1, 2, (4, 8, 8), (2, 2)), ((2, 1, 20, 12),)),
    "UNet2DModel": Net(
        "diffusers",
        diffusers(
            "UNet2DModel",
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        ((2, 3, 18, 12), TIMES),
        sample,
    ),
    "UNet2DConditionModel": Net(
        "diffusers",
        diffusers(
            "UNet2DConditionModel",
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            **CONDITIONED,
        ),
        ((2, 4, 19, 13), TIMES, (2, 5, 6)),
        sample,
    ),
    "UNet3DConditionModel": Net(
        "diffusers",
        diffusers(
            "UNet3DConditionModel",
            block_out_channels=(8, 8),
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            **CONDITIONED,
        ),
        ((1, 4, 3, 11, 6), TIMES[:1], (1, 5, 6)),
        sample,
    ),
}  # fmt: skip
