"""Stable Diffusion's decoder on GPUs that are not here, planned: what ranks in a row and in a mesh send, and launches.

    python -m benchmarks.planned meshes --size 4096 --mesh 8x8 --mesh 4x16
    python -m benchmarks.planned launches

No GPU is used and nothing is measured: bytes, messages, rounds and launches are those of a run, times are a roofline
at the data sheet's rates.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import distpatch
from benchmarks._harness.decoder import FORMATS, LATENT_CHANNELS, PIXELS_PER_LATENT, build_decoder
from benchmarks._harness.printed import markdown_table, wide_console

MIB, GIB = 1 << 20, 1 << 30
PARTS = {
    "convolutions": {"conv2d"},
    "norms": {"group_norm", "std_mean"},
    "attention": {"scaled_dot_product_attention"},
    "output": {"output"},
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def planned(size: int, ranks: int | tuple[int, ...], dtype: torch.dtype) -> distpatch.Plan:
    side = size // PIXELS_PER_LATENT
    with torch.device("meta"):
        vae = torch.nn.Module.to(build_decoder(FORMATS["NCHW"]), dtype)
        latents = torch.empty(1, LATENT_CHANNELS, side, side, dtype=dtype)
    options = {"options": {"dim": (-2, -1)}} if isinstance(ranks, tuple) else {}
    return distpatch.plan(vae, latents, method="decode", world_size=ranks, device="H100", **options)


@app.command()
def meshes(
    size: Annotated[int, typer.Option(help="Side of the picture.")] = 4096,
    mesh: Annotated[list[str] | None, typer.Option(help="Ranks along height and width (8x8, 4x16).")] = None,
) -> None:
    """What the rank with the most sends: ranks in a row, and as many in a mesh; float32."""
    shapes = [tuple(map(int, one.split("x"))) for one in mesh or ["8x8", "4x16"]]
    rows = sorted({math.prod(shape) for shape in shapes})
    title = f"{size} x {size}, float32, MiB sent (rounds); planned for H100s"
    shown = markdown_table(title, "ranks", *PARTS, "in all", "messages", "memory GiB", "ms", "of it sending")
    for ranks in track([*rows, *shapes], console=wide_console(), transient=True):
        plan = planned(size, ranks, torch.float32)
        most = max(plan.ranks, key=lambda rank: rank.sent_bytes)
        cells = [_sent([op for op in plan.ops(most) if op.op in names]) for names in PARTS.values()]
        times = (f"{1e3 * (plan.seconds or 0):.0f}", f"{1e3 * (plan.transfer_seconds_of(plan.busiest) or 0):.0f}")
        name = " x ".join(map(str, ranks)) if isinstance(ranks, tuple) else f"{ranks}, rows"
        sent = f"{plan.sent_bytes / MIB:,.1f} ({plan.rounds})"
        shown.add_row(name, *cells, sent, f"{plan.messages:,}", f"{plan.memory_bytes / GIB:.2f}", *times)
    wide_console().print(shown)


def _sent(ops: list[Any]) -> str:
    return f"{sum(op.sent_bytes for op in ops) / MIB:,.2f} ({sum(op.rounds for op in ops)})"


@app.command()
def launches() -> None:
    """Kernels that a rank launches, calls of attention and rounds, by picture and number of ranks; bfloat16."""
    shown = markdown_table("planned for H100s, bfloat16", "picture", "ranks", "launches", "attention calls", "rounds")
    for size in track((512, 1024, 4096), console=wide_console(), transient=True):
        for ranks in (1, 8):
            plan = planned(size, ranks, torch.bfloat16)
            calls = sum(times for kernel, times in plan.busiest.kernels.items() if "scaled_dot_product" in kernel.name)
            shown.add_row(f"{size} x {size}", str(ranks), f"{plan.launches:,}", str(calls), str(plan.rounds))
    wide_console().print(shown)


if __name__ == "__main__":
    app()
