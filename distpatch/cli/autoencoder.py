"""Encoding and decoding on all ranks: what the sub-commands of that name share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import typer
from torch import Tensor, nn

import distpatch
from distpatch import launch
from distpatch.cli.session import Session

Call = Callable[[nn.Module, Tensor], Tensor]


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


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another dtype; diffusers' own ``to`` warns of weights to be kept in fp32, and there are none."""
    return nn.Module.to(model, dtype)


def run(session: Session, model: nn.Module, call: Call, given: Tensor, what: str) -> tuple[Tensor, dict[str, Any]]:
    """Convert, call, restore: the sharded result, and what it took. Every rank calls it."""
    distpatch.convert_model(model, session.group, output="shard")
    with torch.inference_mode(), distpatch.trace() as sent, session.progress(model, what):
        started = time.perf_counter()
        result = call(model, given)
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)
        seconds = time.perf_counter() - started
    distpatch.restore_model(model)
    return result, {
        "shape": list(result.shape),
        "seconds": seconds,
        "sent_bytes": sent.sent_bytes,
        "messages": sent.messages,
        "fallbacks": sum(fallback.count for fallback in sent.fallbacks),
    }


def difference(session: Session, model: nn.Module, call: Call, given: Tensor, result: Tensor) -> float | None:
    """The largest difference of a sharded result from one process, over its largest value; on rank 0."""
    whole = distpatch.gather(result)

    def compare() -> float:
        with torch.inference_mode(), session.progress(model, "one process"):
            alone = call(model, given)
        return ((alone.double() - whole.double()).abs().max() / alone.double().abs().max()).item()

    return launch.on_rank0(session.group, compare)


def summary(numbers: dict[str, Any], what: str, path: Any) -> str:
    """One line a result, as a person reads it."""
    shape = " x ".join(map(str, numbers["shape"]))
    text = f"{what} {shape} in {numbers['seconds']:.2f} s on {numbers['ranks']} rank(s) of {numbers['device']}: {path}"
    if numbers["fallbacks"]:
        text += f"\n{numbers['fallbacks']} operation(s) were gathered: no sharded rule"
    if numbers.get("error") is not None:
        text += f"\nLargest difference from one process: {numbers['error']:.1e} of the largest value"
    return text
