"""A Stable Diffusion pipeline with displaced steps: ranks do not wait for each other's rows, but use the last step's.

    torchrun --nproc_per_node=2 torchrun_examples/displaced_pipeline.py --check
    torchrun --nproc_per_node=4 torchrun_examples/displaced_pipeline.py --split-guidance \\
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a lighthouse in a storm" --steps 50 --size 1024

Without ``--model`` the demo's U-Net and autoencoder draw textures, as in ``pipeline.py``.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer
from pipeline import MIB, TEXTURES, generate, load_pipeline, prompt_of, side_by_side, table_of_ranks

import distpatch
from distpatch import launch

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of a pipeline.")] = None,
    prompt: Annotated[str, typer.Option(help="For the model; without one, textures.")] = ", ".join(TEXTURES),
    size: Annotated[int, typer.Option(min=16, help="Rows and columns of the picture.")] = 192,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    warmup: Annotated[int, typer.Option(min=0, help="Steps, after the first, that wait for their exchanges.")] = 4,
    policy: Annotated[
        str, typer.Option(help="What the other steps use: see distpatch.displaced.")
    ] = "corrected_async_gn",
    split_guidance: Annotated[bool, typer.Option(help="Half of the ranks with the prompt, half without it.")] = False,
    compare: Annotated[bool, typer.Option("--check", help="Generate on rank 0 alone too, and compare.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a rank.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("out"),
) -> None:
    """Generate a picture across the ranks that torchrun started."""
    with launch.process_group(threads=threads) as (group, device):
        console = launch.console(group)
        pipe = load_pipeline(model, group, device, console.is_terminal and not console.quiet)
        call = {**prompt_of(model, prompt), "height": size, "width": size, "num_inference_steps": steps}

        options = {"policy": policy, "warmup_steps": warmup, "once_per_prompt": ("attn2.to_k", "attn2.to_v")}
        mesh = distpatch.guidance_mesh(group) if split_guidance else group
        parallel = distpatch.parallelize_pipeline(pipe, mesh, displaced=options)
        with distpatch.trace() as sent:
            started = time.perf_counter()
            pictures = generate(parallel, call)
            seconds = time.perf_counter() - started
        pipe = parallel.restore()

        out.mkdir(parents=True, exist_ok=True)
        path = out / f"displaced_pipeline_{group.size()}_ranks.png"
        distpatch.save_image(side_by_side(pictures), path)
        behind = sum(record.sent_bytes for record in sent.records if record.kind == "displaced")
        cells = {
            "seconds": f"{seconds:.1f}",
            "waited for others, s": f"{sent.wait_seconds:.1f}",
            "sent, MiB": f"{sent.sent_bytes / MIB:.1f}",
            "of these behind the computation": f"{behind / MIB:.1f}",
            "waited for these, s": f"{sum(wait.blocked_s for wait in sent.waits):.2f}",
        }
        title = f"{len(pictures)} picture(s) of {size} x {size}, {steps} steps, the first {1 + warmup} of which wait"
        table = table_of_ranks(title, group, cells)
        console.print(table)
        if compare:
            alone = launch.on_rank0(group, lambda: generate(pipe, call))
            if alone is not None:
                error = float((alone - pictures).square().mean())
                console.print(f"PSNR against one process: {-10 * math.log10(max(error, 1e-12)):.1f} dB")
        console.print(f"Picture: {path}")


if __name__ == "__main__":
    app()
