"""Encoding and decoding on all ranks: what the sub-commands of that name share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import typer
from torch import Tensor, nn

from distpatch.cli.models import in_dtype


def decoded(model: Any, latents: Tensor) -> Tensor:
    """The picture or clip; diffusers' autoencoders wrap it in an output class or a tuple."""
    output = model.decode(latents)
    return output.sample if hasattr(output, "sample") else output[0]


def encoded(model: Any, pixels: Tensor) -> Tensor:
    """The latents; of a distribution its mode."""
    output = model.encode(pixels)
    for name in ("latent", "latents"):
        if hasattr(output, name):
            return getattr(output, name)
    distribution = output.latent_dist if hasattr(output, "latent_dist") else output[0]
    return distribution.mode()


def takes_clips(model: nn.Module, part: str) -> bool:
    """Whether the first convolution of a model's part is over time too."""
    modules = getattr(model, part, model).modules()
    weights = (getattr(module, "weight", None) for module in modules)
    dims = next((w.ndim for w in weights if isinstance(w, Tensor) and w.ndim >= 4), 4)
    return dims == 5


def check_input(model: nn.Module, method: str, shape: Sequence[int], source: str) -> None:
    """Raises ``typer.BadParameter`` where a tensor has other channels than the model's config says, or no frames."""
    config: Any = getattr(model, "config", {})
    names = {"decode": ("latent_channels", "z_dim"), "encode": ("in_channels",)}.get(method, ())
    if method == "encode" and config.get("patch_size"):  # in_channels are then those of a patch
        names = ()
    channels = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    clips = takes_clips(model, "encoder" if method == "encode" else "decoder")
    wanted = f"(B, {channels or 'C'}, {'T, ' * clips}H, W)"
    if (channels is not None and shape[1] != channels) or (clips and len(shape) < 5):
        raise typer.BadParameter(
            f"{source}: {type(model).__name__}.{method} takes {wanted}, and this is {tuple(shape)}"
        )


def stable_diffusion(dtype: torch.dtype) -> nn.Module:
    """Stable Diffusion's autoencoder, 84 million parameters; the same random weights on every rank."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    channels = (128, 256, 512, 512)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
    )
    return in_dtype(vae.eval().requires_grad_(False), dtype)
