"""Small pipelines of diffusers from random components, most around U-Nets, and the calls that the tests make. No text
encoder: prompts are given as embeddings."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.support.oracle import random_tensor
from tests.support.zoo.models import tiny_kl
from tests.support.zoo.pipeline import Run
from tests.support.zoo.transformer_pipelines import TRANSFORMER_PIPELINES
from tests.support.zoo.unets import CONDITIONED, DOWN, SDXL, TEXT, UP

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
    **{name: TRANSFORMER_PIPELINES[name] for name in ("FLUX", "Wan, text to video")},
}
