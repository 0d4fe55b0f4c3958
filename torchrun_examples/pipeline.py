"""A whole Stable Diffusion pipeline with its U-Net and its autoencoder on all ranks.

    torchrun --nproc_per_node=2 torchrun_examples/pipeline.py
    torchrun --nproc_per_node=4 torchrun_examples/pipeline.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --prompt "a lighthouse in a storm" --steps 30 --size 1024

Without ``--model`` a tiny pipeline with random weights runs, with random numbers for a prompt: its picture is
noise, and the same noise on any number of ranks.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

import distpatch
from distpatch import launch

TEXT = 32  # numbers a token of the tiny pipeline's prompt

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def tiny_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    channels, attention = (32, 64), {"cross_attention_dim": TEXT, "attention_head_dim": 8}
    unet = UNet2DConditionModel(
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **attention,
    )
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=channels, latent_channels=4, **levels)
    nothing: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(
        unet=unet.eval(), vae=vae.eval(), scheduler=scheduler, requires_safety_checker=False, **nothing
    )


def prompt_of(model: str | None, prompt: str) -> dict[str, Any]:
    if model is not None:
        return {"prompt": prompt}
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(1, 7, TEXT, generator=draw) for name in ("prompt_embeds", "negative_prompt_embeds")}


def generate(pipe: Any, call: dict[str, Any]) -> Tensor:
    """The picture (1, 3, H, W) in [0, 1]. The generator is seeded alike on all ranks, so their noise is the same."""
    picture: Tensor = pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    return picture


@app.command()
def main(
    model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of a pipeline.")] = None,
    prompt: Annotated[str, typer.Option(help="For --model.")] = "a photograph of an astronaut",
    size: Annotated[int, typer.Option(min=16, help="Rows and columns of the picture.")] = 96,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 4,
    compare: Annotated[bool, typer.Option("--check", help="Generate on rank 0 alone too, and compare.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a rank.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("out"),
) -> None:
    """Generate a picture across the ranks that torchrun started."""
    with launch.process_group(threads=threads) as (group, device):
        console = launch.console(group)
        make = tiny_pipeline if model is None else lambda: DiffusionPipeline.from_pretrained(model)
        pipe = launch.rank0_first(group, make).to(device)
        pipe.set_progress_bar_config(disable=not console.is_terminal or console.quiet)
        call = {**prompt_of(model, prompt), "height": size, "width": size, "num_inference_steps": steps}

        distpatch.convert_model(pipe.unet, group)
        distpatch.convert_model(pipe.vae, group)
        with distpatch.trace() as sent:
            started = time.perf_counter()
            picture = generate(pipe, call)
            seconds = time.perf_counter() - started
        distpatch.restore_model(pipe.unet)
        distpatch.restore_model(pipe.vae)

        out.mkdir(parents=True, exist_ok=True)
        path = out / f"pipeline_{group.size()}_ranks.png"
        distpatch.save_image(picture, path)
        console.print(
            f"{steps} steps at {size} x {size} on {group.size()} rank(s): {seconds:.1f} s, "
            f"{sent.sent_bytes / 2**20:.1f} MiB in {sent.messages} messages sent by rank 0, "
            f"{len(sent.fallbacks)} operation(s) without a sharded rule"
        )
        if compare:
            alone = launch.on_rank0(group, lambda: (generate(pipe, call) - picture).abs().max().item())
            console.print(f"Largest difference from one process: {alone or 0:.1e}")
        console.print(f"Picture: {path}")


if __name__ == "__main__":
    app()
