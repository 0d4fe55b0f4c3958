"""Train the small demo VAE on the photographs that scikit-image ships.

The result is an ordinary ``diffusers.AutoencoderKL`` of about one million parameters with 8x
downsampling, GroupNorm and mid-block attention: distpatch can be tried on it without a download.
The astronaut photograph is never trained on; its reconstruction is only measured and reported.

    python torchrun_examples/train_demo_vae.py --minutes 38 --threads 1
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from PIL import Image
from rich.console import Console
from rich.progress import Progress

HELD_OUT = "astronaut.png"
# How often a photograph is drawn: natural scenes more than textures and graphics.
PHOTOGRAPHS = {
    **dict.fromkeys(["motorcycle_left.png", "motorcycle_right.png", "coffee.png"], 4.0),
    **dict.fromkeys(["chelsea.png", "camera.png", "rocket.jpg"], 4.0),
    **dict.fromkeys(["ihc.png", "logo.png", "coins.png", "hubble_deep_field.jpg"], 1.5),
    **dict.fromkeys(["retina.jpg", "brick.png", "grass.png", "gravel.png", "page.png"], 1.0),
    **dict.fromkeys(["color.png", "moon.png"], 0.5),
}
# (pictures, side) -> how often such a batch is drawn; large sides train the attention.
BATCH_SHAPES = {(4, 64): 0.5, (4, 96): 0.3, (1, 192): 0.12, (1, 256): 0.08}
PEAK_RATE = 2e-3
KL_WEIGHT = 1e-6
EMA_DECAY = 0.999
CHECKPOINT = Path(tempfile.gettempdir()) / "demo_vae" / "state.pt"


def load_photograph(name: str) -> torch.Tensor:
    """Return a photograph of scikit-image as a ``(3, height, width)`` tensor in [0, 1]."""
    with files("skimage").joinpath("data", name).open("rb") as file:
        pixels = np.array(Image.open(file).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)


def build_vae() -> AutoencoderKL:
    """Return the untrained VAE."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 72),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=512,
    )
    initialise(vae)
    return vae


@torch.no_grad()
def initialise(vae: AutoencoderKL) -> None:
    """Let signals pass undamped, residual and attention branches faintly, with little noise."""
    for name, conv in vae.named_modules():
        if isinstance(conv, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
            torch.nn.init.zeros_(conv.bias)
            if name.endswith("conv2"):
                conv.weight.mul_(0.1)
    for half in (vae.encoder, vae.decoder):
        for parameter in half.mid_block.attentions[0].to_out[0].parameters():
            parameter.zero_()
    vae.quant_conv.weight.chunk(2)[1].mul_(0.1)
    vae.quant_conv.bias.chunk(2)[1].fill_(-5.0)  # log-variance of the posterior


def random_crop(photograph: torch.Tensor, side: int, rng: random.Random) -> torch.Tensor:
    """Cut a random square of 1x to 3x ``side``, resize it to ``side``, flip and rotate it."""
    height, width = photograph.shape[1:]
    cut = min(round(side * max(1.0, rng.uniform(0.7, 3.0))), height, width)
    top, left = rng.randint(0, height - cut), rng.randint(0, width - cut)
    crop = photograph[:, top : top + cut, left : left + cut]
    if cut != side:
        crop = F.interpolate(crop[None], (side, side), mode="bilinear", antialias=True)[0]
    crop = crop.flip(2) if rng.random() < 0.5 else crop
    return crop.rot90(rng.randrange(4), (1, 2))


def recolour(crop: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Change the colours at random: few photographs have to stand in for many."""
    crop = crop[rng.sample(range(3), 3)] if rng.random() < 0.6 else crop
    if torch.equal(crop[0], crop[1]) and rng.random() < 0.7:  # grey: tint between two colours
        dark, light = torch.rand(2, 3, 1, 1)
        crop = dark * 0.5 + (light * 0.5 + 0.5 - dark * 0.5) * crop
    crop = 1 - crop if rng.random() < 0.2 else crop
    if rng.random() < 0.6:
        gain = rng.uniform(0.7, 1.3) + 0.15 * torch.randn(3, 1, 1)
        crop = (crop - 0.5) * gain + 0.5 + rng.uniform(-0.15, 0.15) + 0.05 * torch.randn(3, 1, 1)
    return crop.clamp(0, 1)


def draw_batch(photographs: dict[str, torch.Tensor], rng: random.Random) -> torch.Tensor:
    """Return a random batch in [-1, 1]."""
    count, side = rng.choices(list(BATCH_SHAPES), list(BATCH_SHAPES.values()))[0]
    names = rng.choices(list(PHOTOGRAPHS), list(PHOTOGRAPHS.values()), k=count)
    crops = [recolour(random_crop(photographs[name], side, rng), rng) for name in names]
    return torch.stack(crops) * 2 - 1


def vae_loss(vae: AutoencoderKL, batch: torch.Tensor) -> torch.Tensor:
    """Return Charbonnier + squared error of the reconstruction, plus a small KL term."""
    posterior = vae.encode(batch).latent_dist
    error = vae.decode(posterior.sample()).sample.float() - batch
    kl = posterior.kl().mean() / math.prod(posterior.mean.shape[2:])
    return (error.square() + 1e-4).sqrt().mean() + error.square().mean() + KL_WEIGHT * kl


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, photograph: torch.Tensor) -> float:
    """Return the PSNR in dB, in [0, 1], of decoding the mode of the posterior."""
    latent = vae.encode(photograph[None] * 2 - 1).latent_dist.mode()
    restored = (vae.decode(latent).sample[0] / 2 + 0.5).clamp(0, 1)
    return -10 * torch.log10((restored - photograph).square().mean()).item()


@torch.no_grad()
def export(ema: AutoencoderKL, photographs: dict[str, torch.Tensor], out: Path) -> None:
    """Save the averaged weights in half precision, with the scaling factor of their latents."""
    crops = [photographs[name][:, :256, :256] for name in ("coffee.png", "motorcycle_left.png")]
    std = ema.encode(torch.stack(crops) * 2 - 1).latent_dist.mode().std().item()
    ema.register_to_config(scaling_factor=round(1 / std, 4))
    copy.deepcopy(ema).half().save_pretrained(out)


def learning_rate(step: int, progress: float) -> float:
    """Return the rate: linear warm-up over 200 steps, then cosine decay to 1% of the peak."""
    decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return PEAK_RATE * decay * min(1.0, (step + 1) / 200)


class Trainer:
    """The VAE in training, its averaged copy and its optimisers.

    Muon updates the weight matrices (a convolution's flattened to 2-D) and AdamW the rest: AdamW
    alone needs many times more steps to get the same quality out of so small a VAE.
    """

    def __init__(self) -> None:
        """Start from an untrained VAE."""
        self.model, self.step, self.seconds = build_vae(), 0, 0.0
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.sources = [p for p in self.model.parameters() if p.ndim > 1]
        self.matrices = [torch.nn.Parameter(p.data.flatten(1)) for p in self.sources]  # views
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        adam = torch.optim.AdamW(vectors, betas=(0.9, 0.99))
        muon = {"weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
        self.optimizers = (torch.optim.Muon(self.matrices, **muon), adam)

    def train(self, batch: torch.Tensor, progress: float) -> float:
        """Do one optimiser step, average the weights and return the loss."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = vae_loss(self.model, batch)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for matrix, source in zip(self.matrices, self.sources, strict=True):
            matrix.grad = source.grad.flatten(1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, progress)
            optimizer.step()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        for average, now in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.lerp_(now.detach(), 1 - decay)
        self.step += 1
        return loss.item()

    def save(self) -> None:
        """Write the checkpoint, replacing an older one only once it is complete."""
        CHECKPOINT.parent.mkdir(exist_ok=True)
        parts = [part.state_dict() for part in (self.model, self.ema, *self.optimizers)]
        torch.save((self.step, self.seconds, parts), CHECKPOINT.with_suffix(".partial"))
        CHECKPOINT.with_suffix(".partial").replace(CHECKPOINT)

    def load(self) -> None:
        """Take over the state that the checkpoint holds."""
        self.step, self.seconds, stored = torch.load(CHECKPOINT, weights_only=True)
        for part, values in zip((self.model, self.ema, *self.optimizers), stored, strict=True):
            part.load_state_dict(values)


def main(
    steps: Annotated[int, typer.Option(help="Stop after this many steps.")] = 1_000_000,
    minutes: Annotated[float, typer.Option(help="Stop after this much training time.")] = 38.0,
    threads: Annotated[int, typer.Option(help="CPU threads to use.")] = 1,
    out: Annotated[Path, typer.Option(help="Weights folder.")] = Path(__file__).parent / "demo_vae",
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 500,
    resume: Annotated[bool, typer.Option(help=f"Go on from {CHECKPOINT}.")] = False,
) -> None:
    """Train the demo VAE, export its averaged weights and report the held-out PSNR."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    trainer = Trainer()
    if resume:
        trainer.load()
    rng = random.Random(seed + trainer.step)
    photographs = {name: load_photograph(name) for name in PHOTOGRAPHS}
    held_out = load_photograph(HELD_OUT)
    console = Console()
    console.print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters")
    started, losses, progress = time.monotonic() - trainer.seconds, [], 0.0
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=1.0)
        while progress < 1:
            trainer.seconds = time.monotonic() - started
            progress = max((trainer.step + 1) / steps, trainer.seconds / 60 / minutes)
            losses.append(trainer.train(draw_batch(photographs, rng), progress))
            bar.update(task, completed=progress)
            if trainer.step % every == 0 or progress >= 1:
                trainer.save()
                export(trainer.ema, photographs, out)
                console.print(
                    f"step {trainer.step:6d}  {trainer.seconds / 60:5.1f} min  "
                    f"loss {sum(losses) / len(losses):.4f}  "
                    f"held-out PSNR {reconstruction_psnr(trainer.ema, held_out):.2f} dB"
                )
                losses.clear()
    shipped = AutoencoderKL.from_pretrained(out)
    console.print(f"shipped weights: {reconstruction_psnr(shipped, held_out):.2f} dB")


if __name__ == "__main__":
    typer.run(main)
