"""Train the small demo U-Net to denoise latents of the demo VAE: textures, each called by a word.

The textures are photographs that scikit-image ships. The result is an ordinary
``diffusers.UNet2DConditionModel`` of about 700,000 parameters, with self- and cross-attention:
``pipeline.py`` draws with it. A word is a token with a one at its own place.

    python torchrun_examples/train_demo_unet.py --steps 2200
    python torchrun_examples/train_demo_unet.py --steps 4500 --resume

This is how the weights in ``demo_unet/`` were made, in a quarter of an hour on one idle core.
"""

from __future__ import annotations

import copy
import math
import random
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from train_demo_vae import load_photograph

HERE = Path(__file__).parent
# Words, the photograph of each, and the colours that it has in place of black and white.
TEXTURES: dict[str, tuple[str, list[list[float]] | None]] = {
    "brick": ("brick.png", [[0.16, 0.05, 0.04], [0.98, 0.66, 0.52]]),
    "grass": ("grass.png", [[0.01, 0.08, 0.02], [0.80, 0.98, 0.45]]),
    "gravel": ("gravel.png", [[0.05, 0.06, 0.10], [0.96, 0.97, 1.00]]),
    "tissue": ("ihc.png", None),
}
TEXT = 8  # numbers a token
SIDE = 128  # pixels of a crop, of which the autoencoder makes 16 x 16 latents
BATCH = 16
PEAK_RATE = 2e-3
EMA_DECAY = 0.998


def tokens(words: list[str]) -> Tensor:
    """A token a word, (words, 1, TEXT); zeros for one that is no texture, which stands for any."""
    table = dict(zip(TEXTURES, torch.eye(TEXT)))
    return torch.stack([table.get(word, torch.zeros(TEXT)) for word in words])[:, None]


def build_scheduler() -> DDIMScheduler:
    """Steps between pure noise and none: the net gives what lies between both (v)."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        steps_offset=1,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=16,
        out_channels=16,
        block_out_channels=(40, 48),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=TEXT,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def texture(word: str) -> Tensor:
    """The photograph, (3, H, W) in [0, 1], in its colours."""
    name, colours = TEXTURES[word]
    picture = load_photograph(name)
    if colours is None:
        return picture
    dark, light = torch.tensor(colours)[..., None, None]
    return dark + (light - dark) * picture[:1]


def random_crop(picture: Tensor, upright: bool, rng: random.Random) -> Tensor:
    """A square of 1 to 2 times ``SIDE``, scaled to ``SIDE``; mirrored, and turned where it need not be ``upright``."""
    cut = rng.randint(SIDE, 2 * SIDE)
    top, left = (rng.randrange(size - cut + 1) for size in picture.shape[1:])
    crop = picture[None, :, top : top + cut, left : left + cut]
    crop = F.interpolate(crop, (SIDE, SIDE), mode="bilinear", antialias=True)[0]
    crop = crop.flip(2) if rng.random() < 0.5 else crop
    return crop.rot90(rng.choice((0, 2) if upright else range(4)), (1, 2))


@torch.no_grad()
def latents_of(vae: AutoencoderKL, word: str, count: int, rng: random.Random) -> Tensor:
    """Of random crops, (count, 16, 16, 16), of about unit deviation.

    Each crop is encoded by itself: a norm over all of a picture gives latents a meaning that parts of them have not.
    """
    picture = texture(word)
    crops = torch.stack([random_crop(picture, word == "brick", rng) for _ in range(count)]) * 2 - 1
    return torch.cat([vae.encode(some).latent_dist.mode() for some in crops.split(16)]) * vae.config.scaling_factor


def draw_batch(latents: dict[str, Tensor], rng: random.Random) -> tuple[Tensor, Tensor]:
    """Random latents, and the token of each; one in ten is called nothing, for guidance."""
    words = rng.choices(list(latents), k=BATCH)
    clean = torch.stack([rng.choice(latents[word]) for word in words])
    return clean, tokens([word if rng.random() > 0.1 else "" for word in words])


def loss_of(net: UNet2DConditionModel, scheduler: DDIMScheduler, clean: Tensor, text: Tensor) -> Tensor:
    noise, times = torch.randn_like(clean), torch.randint(scheduler.config.num_train_timesteps, (len(clean),))
    target = scheduler.get_velocity(clean, noise, times)
    return F.mse_loss(net(scheduler.add_noise(clean, noise, times), times, text).sample, target)


def optimizers_of(net: UNet2DConditionModel) -> tuple[list[tuple[Tensor, Tensor]], list[torch.optim.Optimizer]]:
    """Muon for matrices (a convolution's flattened), each beside the weight that it is seen of; AdamW for the rest."""
    pairs = [(torch.nn.Parameter(p.data.flatten(1)), p) for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    muon = torch.optim.Muon([matrix for matrix, _ in pairs], weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return pairs, [muon, torch.optim.AdamW(vectors, betas=(0.9, 0.99))]


def main(
    steps: Annotated[int, typer.Option(help="Stop after this many steps.")] = 1_000_000,
    minutes: Annotated[float, typer.Option(help="Stop after this much training time.")] = 60.0,
    threads: Annotated[int, typer.Option(help="CPU threads to use.")] = 1,
    out: Annotated[Path, typer.Option(help="Weights folder.")] = HERE / "demo_unet",
    crops: Annotated[int, typer.Option(help="Crops of each texture.")] = 400,
    every: Annotated[int, typer.Option(help="Steps between lines.")] = 500,
    resume: Annotated[bool, typer.Option(help="Go on from the weights in the folder.")] = False,
) -> None:
    """Train the demo U-Net, and export its averaged weights in half precision."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rng, console = random.Random(0), Console()
    vae = AutoencoderKL.from_pretrained(HERE / "demo_vae").float().eval()
    latents = {word: latents_of(vae, word, crops, rng) for word in TEXTURES}
    net, scheduler = UNet2DConditionModel.from_pretrained(out).float() if resume else build_unet(), build_scheduler()
    net.train()
    average = copy.deepcopy(net).requires_grad_(False)
    pairs, optimizers = optimizers_of(net)
    console.print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
    started, losses, progress, step = time.monotonic(), [], 0.0, 0
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=1.0)
        while progress < 1:
            progress = max((step + 1) / steps, (time.monotonic() - started) / 60 / minutes)
            loss = loss_of(net, scheduler, *draw_batch(latents, rng))
            net.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            for matrix, weight in pairs:
                matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
            decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = PEAK_RATE * decay * min(1.0, (step + 1) / 100)
                optimizer.step()
            for kept, now in zip(average.parameters(), net.parameters(), strict=True):
                kept.lerp_(now.detach(), 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
            step += 1
            losses.append(loss.item())
            bar.update(task, completed=progress)
            if step % every == 0 or progress >= 1:
                copy.deepcopy(average).half().save_pretrained(out)
                seconds = time.monotonic() - started
                console.print(f"step {step:6d}  {seconds / 60:5.1f} min  loss {sum(losses) / len(losses):.4f}")
                losses.clear()


if __name__ == "__main__":
    typer.run(main)
