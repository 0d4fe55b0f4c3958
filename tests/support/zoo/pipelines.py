"""Small pipelines of diffusers from random components, and the calls that the tests make. No text encoder: prompts are
given as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.support.oracle import random_tensor
from tests.support.zoo.models import tiny_kl
from tests.support.zoo.unets import CONDITIONED, DOWN, SDXL, TEXT, UP

STEPS = 2
PROMPT = {
    "prompt_embeds": random_tensor((1, 5, TEXT), 1, torch.float32),
    "negative_prompt_embeds": random_tensor((1, 5, TEXT), 2, torch.float32),
}
POOLED = {
    "pooled_prompt_embeds": random_tensor((1, 10), 3, torch.float32),
    "negative_pooled_prompt_embeds": random_tensor((1, 10), 4, torch.float32),
}
SIZE = {"height": 40, "width": 32}
PHOTO = random_tensor((1, 3, 40, 32), 5, torch.float32).sigmoid()
MASK = (random_tensor((1, 1, 40, 32), 6, torch.float32) > 0).float()
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Run:
    """``build`` makes the pipeline; ``call``: its arguments; ``converted``: the components that are."""

    build: Callable[[], Any]
    call: dict[str, Any]
    converted: tuple[str, ...] = ("unet", "vae")

    def __call__(self, pipe: Any, **more: Any) -> Tensor:
        """The picture or clip, from the same seed."""
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": STEPS, "output_type": "pt", **self.call, **more}
        return pipe(generator=torch.Generator().manual_seed(7), return_dict=False, **call)[0]


def vae() -> Any:
    return tiny_kl(channels=(8, 8, 16), dtype=torch.float32)


def unet(**more: Any) -> Any:
    torch.manual_seed(0)
    kind = {**CONDITIONED, "down_block_types": DOWN, "up_block_types": UP, "sample_size": 8}
    return diffusers.UNet2DConditionModel(**{**kind, **more}).eval()


def ddim() -> Any:
    return diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False)


def stable_diffusion(cls: str = "StableDiffusionPipeline", **more: Any) -> Any:
    parts = {"vae": vae(), "unet": unet(), "text_encoder": None, "tokenizer": None, "safety_checker": None}
    rest = {"feature_extractor": None, "scheduler": ddim(), "requires_safety_checker": False}
    return getattr(diffusers, cls)(**{**parts, **rest, **more})


def sdxl(cls: str = "StableDiffusionXLPipeline") -> Any:
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        **SDXL, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), sample_size=8
    ).eval()
    text = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    scheduler = diffusers.EulerDiscreteScheduler(**NOISE)
    return getattr(diffusers, cls)(vae=vae(), unet=net, scheduler=scheduler, add_watermarker=False, **text)


def controlnet() -> Any:
    torch.manual_seed(1)
    net = diffusers.ControlNetModel(
        **CONDITIONED, down_block_types=DOWN, conditioning_embedding_out_channels=(4, 8, 8)
    ).eval()
    for parameter in net.parameters():  # its last convolutions begin as zeros
        torch.nn.init.normal_(parameter, std=0.1)
    return stable_diffusion("StableDiffusionControlNetPipeline", controlnet=net)


def flux() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=10,
        axes_dims_rope=[4, 4, 8],
    ).eval()
    text = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    autoencoder = vae()
    autoencoder.register_to_config(shift_factor=0.1)
    return diffusers.FluxPipeline(vae=autoencoder, transformer=transformer, scheduler=scheduler, **text)


def wan() -> Any:
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=autoencoder, transformer=transformer, scheduler=scheduler
    )


PIPELINES = {
    "Stable Diffusion": Run(stable_diffusion, {**PROMPT, **SIZE}),
    "SDXL": Run(sdxl, {**PROMPT, **POOLED, **SIZE}),
    "image to image": Run(
        lambda: stable_diffusion("StableDiffusionImg2ImgPipeline"), {**PROMPT, "image": PHOTO, "strength": 0.8}
    ),
    "SDXL, image to image": Run(
        lambda: sdxl("StableDiffusionXLImg2ImgPipeline"), {**PROMPT, **POOLED, "image": PHOTO, "strength": 0.8}
    ),
    "inpainting": Run(
        lambda: stable_diffusion("StableDiffusionInpaintPipeline", unet=unet(in_channels=9)),
        {**PROMPT, **SIZE, "image": PHOTO, "mask_image": MASK},
    ),
    "ControlNet": Run(controlnet, {**PROMPT, **SIZE, "image": PHOTO}, ("unet", "vae", "controlnet")),
    "FLUX": Run(
        flux,
        {
            "prompt_embeds": PROMPT["prompt_embeds"],
            "pooled_prompt_embeds": POOLED["pooled_prompt_embeds"],
            **SIZE,
            "guidance_scale": 1.0,
        },
        ("vae", "transformer"),
    ),
    "Wan, text to video": Run(wan, {**PROMPT, "height": 48, "width": 32, "num_frames": 5}, ("vae", "transformer")),
}
