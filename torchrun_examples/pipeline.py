"""A whole Stable Diffusion pipeline with its U-Net and its autoencoder on all ranks.

    torchrun --nproc_per_node=2 torchrun_examples/pipeline.py
    torchrun --nproc_per_node=4 torchrun_examples/pipeline.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --prompt "a lighthouse in a storm" --steps 30 --size 1024

Without ``--model`` the demo's U-Net and autoencoder draw textures of any size: brick, grass, gravel, tissue
(``train_demo_unet.py`` and ``train_demo_vae.py`` made them).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers
import typer
from rich.table import Table
from torch import Tensor

import distpatch
from distpatch import launch

transformers.utils.logging.set_verbosity_error()  # diffusers' imports have it say that torchvision is not there

from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from train_demo_unet import TEXTURES, build_scheduler, tokens  # noqa: E402

HERE = Path(__file__).parent
MIB = 2**20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def demo_pipeline() -> StableDiffusionPipeline:
    nothing: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_pretrained(HERE / "demo_unet").float().eval(),
        vae=AutoencoderKL.from_pretrained(HERE / "demo_vae").float().eval(),
        scheduler=build_scheduler(),
        requires_safety_checker=False,
        **nothing,
    )


def load_pipeline(model: str | None, group: dist.ProcessGroup, device: torch.device, bar: bool) -> Any:
    make = demo_pipeline if model is None else lambda: DiffusionPipeline.from_pretrained(model)
    pipe: Any = launch.rank0_first(group, make).to(device)
    pipe.set_progress_bar_config(disable=not bar)
    return pipe


def prompt_of(model: str | None, prompt: str) -> dict[str, Any]:
    """What the pipeline is called with; of the demo's, a picture for each word that is a texture."""
    if model is not None:
        return {"prompt": prompt}
    words = [word.strip() for word in prompt.split(",") if word.strip()]
    if unknown := [word for word in words if word not in TEXTURES]:
        raise SystemExit(f"--prompt {prompt}: without --model there are {', '.join(TEXTURES)}, and no {unknown[0]}")
    embeddings = {"prompt_embeds": tokens(words), "negative_prompt_embeds": tokens([""] * len(words))}
    return {**embeddings, "guidance_scale": 2.0}


def generate(pipe: Any, call: dict[str, Any]) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1]. The generator is seeded alike on all ranks, so their noise is the same."""
    pictures: Tensor = pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    return pictures


def side_by_side(pictures: Tensor) -> Tensor:
    return torch.cat(list(pictures), -1)


def table_of_ranks(title: str, group: dist.ProcessGroup, own: dict[str, str]) -> Table:
    """A row for each rank, of what it has to say by heading."""
    rows: list[Any] = [None] * group.size()
    dist.all_gather_object(rows, own, group=group)
    table = Table(title=title, title_justify="left")
    for heading in ("rank", *own):
        table.add_column(heading, justify="right")
    for rank, row in enumerate(rows):
        table.add_row(str(rank), *row.values())
    return table


@app.command()
def main(
    model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of a pipeline.")] = None,
    prompt: Annotated[str, typer.Option(help="For the model; without one, textures.")] = ", ".join(TEXTURES),
    size: Annotated[int, typer.Option(min=16, help="Rows and columns of the picture.")] = 192,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    compare: Annotated[bool, typer.Option("--check", help="Generate on rank 0 alone too, and compare.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a rank.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("out"),
) -> None:
    """Generate a picture across the ranks that torchrun started."""
    with launch.process_group(threads=threads) as (group, device):
        console = launch.console(group)
        pipe = load_pipeline(model, group, device, console.is_terminal and not console.quiet)
        call = {**prompt_of(model, prompt), "height": size, "width": size, "num_inference_steps": steps}

        parallel = distpatch.parallelize_pipeline(pipe, group)
        with distpatch.trace() as sent:
            started = time.perf_counter()
            pictures = generate(parallel, call)
            seconds = time.perf_counter() - started
        pipe = parallel.restore()

        out.mkdir(parents=True, exist_ok=True)
        path = out / f"pipeline_{group.size()}_ranks.png"
        distpatch.save_image(side_by_side(pictures), path)
        cells = {
            "seconds": f"{seconds:.1f}",
            "waited for others, s": f"{sent.wait_seconds:.1f}",
            "sent, MiB": f"{sent.sent_bytes / MIB:.1f}",
            "messages": f"{sent.messages:,}",
            "operations gathered": str(len(sent.fallbacks)),
        }
        title = f"{len(pictures)} picture(s) of {size} x {size}, {steps} steps"
        table = table_of_ranks(title, group, cells)
        console.print(table)
        if compare:
            alone = launch.on_rank0(group, lambda: (generate(pipe, call) - pictures).abs().max().item())
            console.print(f"Largest difference from one process: {alone or 0:.1e}")
        console.print(f"Picture: {path}")


if __name__ == "__main__":
    app()
