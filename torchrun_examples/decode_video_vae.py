"""Decode a clip across ranks and write it to disk frame by frame: no rank ever holds the whole clip.

    torchrun --nproc_per_node=2 torchrun_examples/decode_video_vae.py
    torchrun --nproc_per_node=8 torchrun_examples/decode_video_vae.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --subfolder vae --height 720 --width 1280 --frames 81

Without ``--model`` a small AutoencoderKLWan with random weights decodes random latents. ``--check`` decodes on
rank 0 alone too, and compares.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from diffusers import AutoencoderKLWan
from rich.table import Table
from torch import Tensor

import distpatch
from distpatch import launch

MIB = 1 << 20
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def load_model(model: str | None, subfolder: str | None) -> AutoencoderKLWan:
    if model is not None:
        return AutoencoderKLWan.from_pretrained(model, subfolder=subfolder).eval()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    return AutoencoderKLWan(**sizes, temperal_downsample=[False, True, True]).eval()


def draw_latents(vae: AutoencoderKLWan, frames: int, height: int, width: int) -> Tensor:
    """(1, C, T, H, W), the same on every rank."""
    shape = (1, vae.config.z_dim, (frames - 1) // 4 + 1, height // 8, width // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def check(vae: AutoencoderKLWan, latents: Tensor, clip: distpatch.PatchTensor, group: dist.ProcessGroup) -> str:
    """How far the clip is from that of one process."""
    whole = distpatch.gather(clip)

    def compare() -> str:
        difference = (vae.decode(latents).sample - whole).abs().max().item()
        return f"Largest difference from one process: {difference:.1e}"

    return launch.on_rank0(group, compare) or ""


@app.command()
@torch.no_grad()
def main(
    model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of an AutoencoderKLWan.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in it, for example 'vae'.")] = None,
    height: Annotated[int, typer.Option(min=8, help="Rows of a frame, a multiple of 8.")] = 128,
    width: Annotated[int, typer.Option(min=8, help="Columns of a frame, a multiple of 8.")] = 192,
    frames: Annotated[int, typer.Option(min=1, help="4 n + 1.")] = 9,
    compare: Annotated[bool, typer.Option("--check", help="Decode on rank 0 alone too, and compare.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a rank.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the clip.")] = Path("out"),
) -> None:
    """Decode a clip across the ranks that torchrun started, and stream it to disk."""
    with launch.process_group(threads=threads) as (group, device):
        console = launch.console(group)
        vae = launch.rank0_first(group, lambda: load_model(model, subfolder)).to(device)
        latents = draw_latents(vae, frames, height, width).to(device)
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"decode_video_vae_{group.size()}_ranks.mp4"
        distpatch.convert_model(vae, group, output="shard")
        with distpatch.LivePeak() as live, distpatch.trace() as sent:
            started = time.perf_counter()
            clip = vae.decode(latents).sample
            decoded = time.perf_counter()
            distpatch.save_video(clip, path, fps=16, value_range=(-1, 1), progress=True)
            saved = time.perf_counter()
        distpatch.restore_model(vae)
        costs: list[Any] = [None] * group.size()
        mine = (clip.local.shape[-2], decoded - started, saved - decoded, live.peak_bytes, sent.sent_bytes)
        dist.all_gather_object(costs, mine, group=group)
        table = Table(title=f"{tuple(clip.shape)} on {group.size()} rank(s)", title_justify="left")
        for heading in ("rank", "rows", "decode s", "save s", "live MiB", "sent KiB"):
            table.add_column(heading, justify="right")
        for rank, (rows, decoding, saving, peak, sent_bytes) in enumerate(costs):
            cells = (rank, rows, f"{decoding:.2f}", f"{saving:.2f}", f"{peak / MIB:.1f}", f"{sent_bytes / 1024:,.0f}")
            table.add_row(*map(str, cells))
        console.print(table)
        if compare:
            console.print(check(vae, latents, clip, group))
        console.print(f"Clip: {path}")


if __name__ == "__main__":
    app()
