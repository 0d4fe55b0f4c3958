"""Train a small denoiser of latents, for ``benchmarks.displaced``: it has to work, not to paint well.

    python -m benchmarks.displaced.train_denoiser --seconds 100
    python -m benchmarks.displaced.train_denoiser --model transformer --seconds 150

An ``UNet2DModel`` with attention, or a ``DiTTransformer2DModel``, on latents of the demo VAE, of crops of the
photographs that scikit-image ships.
"""

from __future__ import annotations

import math
import random
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from rich.progress import Progress
from torch import Tensor, nn

from torchrun_examples.train_demo_vae import PHOTOGRAPHS, load_photograph, random_crop

ROOT = Path(__file__).parents[2]
DEMO_VAE = ROOT / "torchrun_examples" / "demo_vae"
WEIGHTS = ROOT / "out" / "denoiser"
SIDE = 128  # pixels of a crop
CROPS, BATCH = 256, 12

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Kind(StrEnum):
    UNET = "unet"
    TRANSFORMER = "transformer"


CLASSES = {Kind.UNET: UNet2DModel, Kind.TRANSFORMER: DiTTransformer2DModel}
CONFIGS = {
    Kind.UNET: {
        "out_channels": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 16,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    Kind.TRANSFORMER: {
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "num_layers": 4,
        "sample_size": SIDE // 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1,
    },
}


def load_denoiser(kind: Kind) -> nn.Module:
    net: nn.Module = CLASSES[kind].from_pretrained(WEIGHTS / kind).eval()
    return net


def noise_in(net: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    """What the net takes for noise in x, (B, 16, h, w), at a time, or at one for each of the batch."""
    if not isinstance(net, DiTTransformer2DModel):
        return net(x, time).sample
    return net(x, timestep=time.expand(len(x)), class_labels=torch.zeros(len(x), dtype=torch.long)).sample


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)


def load_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(DEMO_VAE).float().eval().requires_grad_(False)


@torch.no_grad()
def draw_latents(vae: AutoencoderKL, rng: random.Random) -> Tensor:
    """Latents of random crops, (CROPS, 16, SIDE / 8, SIDE / 8), of about unit deviation."""
    photographs = [load_photograph(name) for name in PHOTOGRAPHS]
    crops = torch.stack([random_crop(rng.choice(photographs), SIDE, rng) for _ in range(CROPS)]) * 2 - 1
    modes = [vae.encode(some).latent_dist.mode() for some in crops.split(8)]
    return torch.cat(modes) * vae.config.scaling_factor


@app.command()
def main(
    seconds: Annotated[float, typer.Option(min=1, help="Time to train for.")] = 100,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    model: Annotated[Kind, typer.Option(help="Which denoiser.")] = Kind.UNET,
) -> None:
    """Train, and say what part of the noise is still taken for picture."""
    torch.set_num_threads(threads)
    latents = draw_latents(load_vae(), random.Random(0))
    torch.manual_seed(0)
    net, noise = CLASSES[model](in_channels=16, **CONFIGS[model]).train(), scheduler()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-4)
    started, losses = time.monotonic(), []
    with Progress(transient=True) as progress:
        task = progress.add_task("Training", total=seconds)
        while (passed := time.monotonic() - started) < seconds:
            progress.update(task, completed=passed)
            for setting in optimizer.param_groups:
                setting["lr"] = 2e-3 * (0.5 + 0.5 * math.cos(math.pi * passed / seconds))
            clean = latents[torch.randint(CROPS, (BATCH,))]
            target, times = torch.randn_like(clean), torch.randint(1000, (BATCH,))
            loss = F.mse_loss(noise_in(net, noise.add_noise(clean, target, times), times), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    net.eval().save_pretrained(WEIGHTS / model)
    tail = losses[-max(len(losses) // 10, 1) :]
    typer.echo(
        f"{len(losses)} batches of {BATCH}: mean squared error {sum(tail) / len(tail):.3f} of noise of variance 1"
    )
    typer.echo(f"Weights: {WEIGHTS / model}")


if __name__ == "__main__":
    app()
