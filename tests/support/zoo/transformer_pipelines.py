"""Small pipelines of diffusers around transformers: of the configs in the tables of transformers and autoencoders, with
prompts as embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.support.oracle import random_tensor
from tests.support.zoo.autoencoders import AUTOENCODERS
from tests.support.zoo.image_transformers import IMAGES
from tests.support.zoo.models import tiny_kl
from tests.support.zoo.pipeline import Run
from tests.support.zoo.token_transformers import TOKENS
from tests.support.zoo.video_transformers import VIDEOS

WIDTH = 8  # numbers a token of text
MASK = torch.ones(1, 5, dtype=torch.long)


def text(seed: int, *shape: int) -> Tensor:
    return random_tensor(shape or (1, 5, WIDTH), seed, torch.float32)


PROMPT = {"prompt_embeds": text(1), "negative_prompt_embeds": text(2)}
NUMBERS = {"latents_mean": [0.1, -0.1, 0.2, 0.0], "latents_std": [1.0, 2.0, 1.5, 1.2]}  # of latents, by channel
FEW = {"base_dim": 8, "dim_mult": [1, 1, 1, 1]}  # channels
MASKS = {"prompt_attention_mask": MASK, "negative_prompt_attention_mask": MASK}


def transformer(name: str, **more: Any) -> Any:
    entry = {**IMAGES, **TOKENS, **VIDEOS}[name]
    return replace(entry, config={**entry.config, **more}, dtype=torch.float32).build()


def autoencoder(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    entry = AUTOENCODERS[name]
    return getattr(diffusers, entry.cls)(**{**entry.config, **more}).eval()


def flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def without_text(*more: str) -> dict[str, None]:
    return dict.fromkeys(("text_encoder", "tokenizer", *more))


def kl(levels: int = 4) -> Any:
    vae = tiny_kl(channels=(8, 8, 8, 16)[-levels:], dtype=torch.float32)
    vae.register_to_config(shift_factor=0.1)
    return vae


def stable_diffusion_3() -> Any:
    parts = {"transformer": transformer("SD3Transformer2DModel"), "vae": kl(), "scheduler": flow()}
    more = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return diffusers.StableDiffusion3Pipeline(**parts, **without_text(*more))


def lumina() -> Any:
    parts = {"transformer": transformer("Lumina2Transformer2DModel"), "vae": kl(), "scheduler": flow()}
    return diffusers.Lumina2Pipeline(**parts, **without_text())


def sana() -> Any:
    parts = {"transformer": transformer("SanaTransformer2DModel"), "vae": autoencoder("AutoencoderDC")}
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return diffusers.SanaPipeline(**parts, scheduler=scheduler, **without_text())


def qwen() -> Any:
    vae = autoencoder("AutoencoderKLQwenImage", **FEW, **NUMBERS)
    parts = {"transformer": transformer("QwenImageTransformer2DModel"), "vae": vae, "scheduler": flow()}
    return diffusers.QwenImagePipeline(**parts, **without_text())


def ltx() -> Any:
    net = transformer("LTXVideoTransformer3DModel", in_channels=8, out_channels=8)
    parts = {"transformer": net, "vae": autoencoder("AutoencoderKLLTXVideo"), "scheduler": flow()}
    return diffusers.LTXPipeline(**parts, **without_text())


def hunyuan() -> Any:
    net = transformer("HunyuanVideoTransformer3DModel")
    parts = {"transformer": net, "vae": autoencoder("AutoencoderKLHunyuanVideo"), "scheduler": flow()}
    return diffusers.HunyuanVideoPipeline(**parts, **without_text("text_encoder_2", "tokenizer_2"))


def flux() -> Any:
    net = transformer("FluxTransformer2DModel", in_channels=16)
    parts = {"transformer": net, "vae": kl(levels=3), "scheduler": flow()}
    return diffusers.FluxPipeline(**parts, **without_text("text_encoder_2", "tokenizer_2"))


def wan(**more: Any) -> Any:
    """As Wan 2.1; with ``transformer_2`` as Wan 2.2, which has one for much noise and another for little."""
    vae = autoencoder("AutoencoderKLWan", **FEW, **NUMBERS)
    parts = {"transformer": transformer("WanTransformer3DModel"), "vae": vae, "scheduler": flow(shift=7.0)}
    return diffusers.WanPipeline(**parts, **without_text(), **more)


SIZE = {"height": 80, "width": 48}
CLIP = {"height": 48, "width": 32, "num_frames": 5}
POOLED = {"pooled_prompt_embeds": text(3, 1, 6), "negative_pooled_prompt_embeds": text(4, 1, 6)}
ALL_IMAGE = {"height": 32, "width": 32, "use_resolution_binning": False, "negative_prompt": None, "guidance_scale": 1.5}
BOTH = ("vae", "transformer")
TRANSFORMER_PIPELINES = {
    "Stable Diffusion 3": Run(stable_diffusion_3, {**PROMPT, **POOLED, **SIZE}, BOTH),
    "Lumina 2": Run(lumina, {**PROMPT, **MASKS, **SIZE}, BOTH),
    "Sana": Run(sana, {**PROMPT, **MASKS, **ALL_IMAGE}, BOTH),
    "FLUX": Run(
        flux,
        {"prompt_embeds": text(1), "pooled_prompt_embeds": text(3, 1, 6), "height": 40, "width": 32},
        BOTH,
    ),
    "Qwen-Image": Run(qwen, {**PROMPT, "prompt_embeds_mask": MASK, "negative_prompt_embeds_mask": MASK, **SIZE}, BOTH),
    "LTX": Run(ltx, {**PROMPT, **MASKS, "height": 96, "width": 64, "num_frames": 9}, BOTH),
    "HunyuanVideo": Run(
        hunyuan,
        {"prompt_embeds": text(1), "prompt_attention_mask": MASK, "pooled_prompt_embeds": text(3, 1, 8), **CLIP},
        BOTH,
    ),
    "Wan, text to video": Run(wan, {**PROMPT, **CLIP}, BOTH),
    "Wan 2.2": Run(
        lambda: wan(transformer_2=transformer("WanTransformer3DModel"), boundary_ratio=0.9),
        {**PROMPT, **CLIP},
        (*BOTH, "transformer_2"),
    ),
}
