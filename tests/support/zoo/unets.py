"""Small U-Nets, ControlNets and adapters of diffusers: how to build one, and what to call it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.support.oracle import random_tensor

CHANNELS = (8, 16)
TEXT = 12  # numbers a token of the prompt

DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
CONDITIONED = {
    "block_out_channels": CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 4,
}
SDXL = {
    **CONDITIONED,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
ADDED = {"text_embeds": random_tensor((2, 10)), "time_ids": random_tensor((2, 6))}


@dataclass(frozen=True)
class Net:
    """``inputs``: from the rows to the keyword arguments; ``rows``: of the sharded images."""

    cls: str
    config: dict[str, Any]
    inputs: Callable[[int], dict[str, Any]]
    rows: tuple[int, ...] = (8, 7, 2)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return getattr(diffusers, self.cls)(**self.config).double().eval()


def sample(rows: int, *lead: int, width: int = 6, seed: int = 0) -> Tensor:
    return random_tensor((*lead, rows, width), seed)


def text(batch: int = 2, tokens: int = 5) -> Tensor:
    return random_tensor((batch, tokens, TEXT), seed=9)


def denoise(*lead: int) -> Callable[[int], dict[str, Any]]:
    """The arguments of a U-Net that a prompt conditions."""
    return lambda rows: {"sample": sample(rows, *lead), "timestep": 3, "encoder_hidden_states": text(lead[0])}


def controlled(rows: int) -> dict[str, Any]:
    return {**denoise(2, 4)(rows), "controlnet_cond": sample(8 * rows, 2, 3, width=48, seed=1)}


def cascade(rows: int) -> dict[str, Any]:
    given = {
        "timestep_ratio": torch.full((2,), 0.5, dtype=torch.float64),
        "clip_text_pooled": random_tensor((2, 1, 10)),
    }
    return {"sample": sample(rows, 2, 4), **given, "clip_text": text(), "clip_img": random_tensor((2, 1, 8), seed=3)}


NETS = {
    "UNet2D": Net(
        "UNet2DModel",
        {
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": CHANNELS,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
        },
        lambda rows: {"sample": sample(rows, 2, 3), "timestep": 3},
        rows=(8, 6, 2),
    ),
    "UNet2D, FIR resampling": Net(
        "UNet2DModel",
        {
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "attention_head_dim": 4,
            "time_embedding_type": "fourier",
        },
        lambda rows: {"sample": sample(rows, 2, 3), "timestep": 3},
        rows=(8, 6),
    ),
    "UNet2DCondition": Net("UNet2DConditionModel", {**CONDITIONED, "down_block_types": DOWN, "up_block_types": UP}, denoise(2, 4)),
    "UNet2DCondition, SDXL": Net(
        "UNet2DConditionModel",
        {**SDXL, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        lambda rows: {**denoise(2, 4)(rows), "added_cond_kwargs": ADDED},
    ),
    "UNet2DCondition, text masks": Net(
        "UNet2DConditionModel",
        {
            **CONDITIONED,
            "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "resnet_time_scale_shift": "scale_shift",
        },
        lambda rows: {**denoise(2, 4)(rows), "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])},
        rows=(8, 6, 2),
    ),
    "UNet3DCondition": Net(
        "UNet3DConditionModel",
        {
            **CONDITIONED,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        denoise(2, 4, 3),
    ),
    "UNetMotion": Net(
        "UNetMotionModel",
        {
            **{name: value for name, value in CONDITIONED.items() if name != "attention_head_dim"},
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
        },
        lambda rows: {"sample": sample(rows, 2, 4, 3), "timestep": 3, "encoder_hidden_states": text(6)},
    ),
    "UNetSpatioTemporal": Net(
        "UNetSpatioTemporalConditionModel",
        {
            "in_channels": 4,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": TEXT,
            "num_attention_heads": (2, 4),
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "num_frames": 3,
        },
        lambda rows: {
            "sample": sample(rows, 2, 3, 4),
            "timestep": 3,
            "encoder_hidden_states": text(2, 1),
            "added_time_ids": random_tensor((2, 3)),
        },
        rows=(8, 6, 2),
    ),
    "I2VGenXL": Net(
        "I2VGenXLUNet",
        {
            **{name: value for name, value in CONDITIONED.items() if name != "attention_head_dim"},
            "block_out_channels": (32, 64),
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda rows: {
            **denoise(2, 4, 3)(rows),
            "fps": torch.tensor([4, 4]),
            "image_latents": sample(rows, 2, 4, 3, seed=2),
            "image_embeddings": random_tensor((2, TEXT), seed=3),
        },
        rows=(8, 7),
    ),
    "Kandinsky3": Net(
        "Kandinsky3UNet",
        {
            "time_embedding_dim": 4,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 3,
            "block_out_channels": (32, 64),
            "cross_attention_dim": TEXT,
            "encoder_hid_dim": TEXT,
        },
        lambda rows: {
            "sample": sample(rows, 2, 4, width=6),
            "timestep": 3,
            "encoder_hidden_states": text(),
            "encoder_attention_mask": torch.ones(2, 5),
        },
        rows=(8, 7, 2),
    ),
    "StableCascade": Net(
        "StableCascadeUNet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "patch_size": 1,
            "conditioning_dim": 16,
            "block_out_channels": (16, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 2),
            "up_num_layers_per_block": (2, 1),
            "clip_text_in_channels": TEXT,
            "clip_text_pooled_in_channels": 10,
            "clip_image_in_channels": 8,
            "clip_seq": 2,
            "switch_level": (False,),
        },
        cascade,
    ),
    "StableCascade, decoder": Net(
        "StableCascadeUNet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "patch_size": 2,
            "conditioning_dim": 16,
            "block_out_channels": (16, 16),
            "num_attention_heads": (0, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "block_types_per_layer": (
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            "clip_text_pooled_in_channels": 10,
            "clip_seq": 2,
            "effnet_in_channels": 4,
            "pixel_mapper_in_channels": 3,
            "self_attn": False,
            "timestep_conditioning_type": ("sca",),
        },
        lambda rows: {
            "sample": sample(rows, 2, 4),
            "timestep_ratio": torch.full((2,), 0.5, dtype=torch.float64),
            "clip_text_pooled": random_tensor((2, 1, 10)),
            "effnet": sample(3, 2, 4, width=3),
        },
        rows=(16, 8),
    ),
    "ControlNet": Net(
        "ControlNetModel",
        {**CONDITIONED, "down_block_types": DOWN, "conditioning_embedding_out_channels": (4, 8, 8, 16)},
        controlled,
    ),
    "ControlNetXS": Net(
        "UNetControlNetXSModel",
        {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": CHANNELS,
            "norm_num_groups": 4,
            "cross_attention_dim": TEXT,
            "num_attention_heads": 2,
            "ctrl_block_out_channels": (4, 8),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 4,
            "ctrl_conditioning_embedding_out_channels": (4, 8, 8, 16),
        },
        controlled,
        rows=(8, 6, 2),
    ),
    "T2IAdapter": Net(
        "T2IAdapter",
        {"channels": [8, 8, 16, 16], "num_res_blocks": 1, "downscale_factor": 8},
        lambda rows: {"x": sample(8 * rows, 2, 3, width=64)},
    ),
    "T2IAdapter, light": Net(
        "T2IAdapter",
        {"channels": [8, 8, 16, 16], "num_res_blocks": 1, "downscale_factor": 8, "adapter_type": "light_adapter"},
        lambda rows: {"x": sample(8 * rows, 2, 3, width=64)},
    ),
}  # fmt: skip
