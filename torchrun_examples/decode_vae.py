"""Encode and decode a photograph across ranks, and compare with one process, and with tiles.

    torchrun --nproc_per_node=2 torchrun_examples/decode_vae.py
    torchrun --nproc_per_node=4 torchrun_examples/decode_vae.py --image photo.jpg --size 2160

Works with any ``diffusers.AutoencoderKL``: ``--model`` is a folder or a Hugging Face id.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import typer
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import distpatch
from distpatch import launch

PASSES = 3  # a warm-up, one for the time, one for memory and traffic
SHIPPED = Path(__file__).parent / "demo_vae"
CAPTION_ROWS = 28

MIB = 1 << 20
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Cost:
    """What one call cost one rank."""

    seconds: float
    peak_bytes: int
    sent_bytes: int = 0
    messages: int = 0


@dataclass
class RoundTrip:
    """Latents and picture (on rank 0), and each rank's costs, of encoding and decoding."""

    latents: Tensor
    picture: Tensor
    costs: dict[str, list[Cost]]


def load_model(model: str, subfolder: str | None, dtype: torch.dtype) -> AutoencoderKL:
    """An ordinary AutoencoderKL from a folder or a Hugging Face id; exits with the reason if it is none."""
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    folder = Path(model).expanduser()
    if is_path and not folder.is_dir():
        raise SystemExit(f"--model {model}: there is no such folder")
    try:
        source = folder if folder.is_dir() else model
        vae = AutoencoderKL.from_pretrained(source, subfolder=subfolder, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {model}: cannot load an AutoencoderKL from it: {error}") from error
    return vae.eval()


def load_photograph(image: Path | None, size: int | None) -> Tensor:
    """The picture as (1, 3, H, W) in [-1, 1]; H is ``size`` where it is given, and W follows."""
    try:
        photograph = Image.open(image).convert("RGB") if image else astronaut()
    except OSError as error:
        raise SystemExit(f"--image {image}: {error}") from error
    if size is not None:
        width = max(round(photograph.width * size / photograph.height), 8)
        photograph = photograph.resize((width, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def whole_latents(photograph: Tensor, vae: AutoencoderKL) -> Tensor:
    """The photograph without the last rows and columns that would not fill a latent."""
    factor = factor_of(vae)
    height, width = (max(size // factor, 1) * factor for size in photograph.shape[-2:])
    return photograph[..., :height, :width]


def factor_of(vae: AutoencoderKL) -> int:
    """Rows of the picture for each of the latents."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def astronaut() -> Image.Image:
    """The photograph of Eileen Collins that scikit-image ships."""
    from skimage import data

    return Image.fromarray(data.astronaut())


def measure(
    call: Callable[[Any], Any], given: Any, ready: Callable[[], None], tick: Callable[[], None]
) -> tuple[Any, Cost]:
    """Call three times: to warm up, for the time alone, and for memory and traffic.

    ``ready`` ends what the device, or a rank that comes late, still has to do: it is in nobody's time.
    """
    call(given)
    tick()
    ready()
    started = time.perf_counter()
    result = call(given)
    ready()
    seconds = time.perf_counter() - started
    tick()
    with distpatch.LivePeak() as live, distpatch.trace() as sent:
        call(given)
    tick()
    return result, Cost(seconds, live.peak_bytes, sent.sent_bytes, sent.messages)


def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return vae.encode(pixels).latent_dist.mode()


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return vae.decode(latents).sample


def on_one_process(vae: AutoencoderKL, pixels: Tensor, tick: Callable[[], None]) -> RoundTrip:
    """Encode and decode without distpatch."""

    def ready() -> None:
        if pixels.is_cuda:
            torch.cuda.synchronize()

    latents, encoding = measure(partial(encode, vae), pixels, ready, tick)
    picture, decoding = measure(partial(decode, vae), latents, ready, tick)
    return RoundTrip(latents, picture, {"encode": [encoding], "decode": [decoding]})


def one_and_tiles(vae: AutoencoderKL, pixels: Tensor, tick: Callable[[], None]) -> tuple[RoundTrip, Tensor]:
    """Without distpatch: as a whole, and in tiles."""
    single = on_one_process(vae, pixels, tick)
    return single, in_tiles(vae, single.latents)


def in_tiles(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The picture as diffusers' tiling decodes it on one device, in tiles of half its height."""
    tile = max(latents.shape[-2] // 2, 2)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = tile, tile * factor_of(vae)
    picture = decode(vae, latents)
    vae.disable_tiling()
    return picture


def across_ranks(
    vae: AutoencoderKL, pixels: Tensor, group: dist.ProcessGroup, output: str, tick: Callable[[], None]
) -> RoundTrip:
    """Encode and decode on all ranks; the latents stay sharded in between."""

    def ready() -> None:
        if pixels.is_cuda:
            torch.cuda.synchronize()
        dist.barrier(group)

    distpatch.convert_model(vae, group, output="shard")
    latents, encoding = measure(partial(encode, vae), pixels, ready, tick)
    distpatch.restore_model(vae)
    distpatch.convert_model(vae, group, output=output)
    picture, decoding = measure(partial(decode, vae), latents, ready, tick)
    distpatch.restore_model(vae)

    costs: list[Any] = [None] * group.size()
    dist.all_gather_object(costs, (encoding, decoding), group=group)
    by_stage = dict(zip(("encode", "decode"), map(list, zip(*costs, strict=True)), strict=True))
    return RoundTrip(distpatch.gather(latents), distpatch.gather(picture), by_stage)


def cost_table(title: str, single: RoundTrip, sharded: RoundTrip) -> Table:
    """Time, memory and traffic of each rank beside those of one process."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("")
    for heading in ("seconds", "faster", "live MiB", "share", "sent KiB", "messages"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage, (alone,) in single.costs.items():
        table.add_row(stage, "alone", f"{alone.seconds:.3f}", "", f"{alone.peak_bytes / MIB:.1f}")
        slowest = max(cost.seconds for cost in sharded.costs[stage])
        for rank, cost in enumerate(sharded.costs[stage]):
            table.add_row(
                "",
                f"rank {rank}",
                f"{cost.seconds:.3f}",
                f"{alone.seconds / slowest:.2f}x" if rank == 0 else "",
                f"{cost.peak_bytes / MIB:.1f}",
                f"{cost.peak_bytes / alone.peak_bytes:.2f}",
                f"{cost.sent_bytes / 1024:,.0f}",
                f"{cost.messages}",
            )
        table.add_section()
    return table


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def psnr(picture: Tensor, photograph: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of a picture in [-1, 1]."""
    error = picture.double().clamp(-1, 1) - photograph.double()
    return -10 * math.log10(error.square().mean().item() / 4)


def side_by_side(photograph: Tensor, sharded: Tensor, single: Tensor, tiled: Tensor, ranks: int) -> Image.Image:
    """Photograph and decoded picture with its difference from one process; below, the same of tiles, and both alike.

    Differences are amplified until they can be seen: the first for itself, the last two as those of the tiles.
    """
    difference, of_tiles = (sharded.float() - single.float()).abs(), (tiled.float() - single.float()).abs()
    own, common = amplification(difference), amplification(of_tiles)
    across = f"across {ranks} rank{'s' if ranks > 1 else ''}"
    rows = [
        ("photograph", photograph),
        (f"decoded {across}", sharded),
        (f"{across}: difference from one process x {own:g}", amplified(difference, own)),
        ("decoded in tiles on one device", tiled),
        (f"in tiles: difference x {common:g}", amplified(of_tiles, common)),
        (f"{across}: difference x {common:g}", amplified(difference, common)),
    ]
    height, width = photograph.shape[-2:]
    sheet = Image.new("RGB", (3 * width, 2 * (height + CAPTION_ROWS)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (text, panel) in enumerate(rows):
        pixels = ((panel[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        left, top = place % 3 * width, place // 3 * (height + CAPTION_ROWS)
        sheet.paste(Image.fromarray(pixels), (left, top + CAPTION_ROWS))
        draw.text((left + 8, top + 6), text, fill="black", font=ImageFont.load_default(14))
    return sheet


def amplification(difference: Tensor) -> float:
    """A power of ten that makes the largest difference one to ten tenths of white."""
    largest = difference.max().item()
    return 10.0 ** math.ceil(-math.log10(largest)) if largest else 1.0


def amplified(difference: Tensor, times: float) -> Tensor:
    return difference * 2 * times - 1


@app.command()
@torch.no_grad()
def main(
    model: Annotated[str, typer.Option(help="Folder or Hugging Face id of an AutoencoderKL.")] = str(SHIPPED),
    subfolder: Annotated[str | None, typer.Option(help="Where in it, for example 'vae'.")] = None,
    image: Annotated[Path | None, typer.Option(help="A photograph; scikit-image's astronaut if none.")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Scale the photograph to this many rows.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"], typer.Option(help="Of weights and activations.")
    ] = "float32",
    output_layout: Annotated[
        Literal["gather", "shard", "rank0"], typer.Option(help="Who gets the decoded picture.")
    ] = "gather",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a rank.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("out"),
) -> None:
    """Encode and decode a photograph across the ranks that torchrun started."""
    with launch.process_group(threads=threads) as (group, device):
        console = launch.console(group)
        precision = getattr(torch, dtype)
        photograph = launch.rank0_first(group, lambda: load_photograph(image, size))
        vae = launch.rank0_first(group, lambda: load_model(model, subfolder, precision)).to(device)
        pixels = whole_latents(photograph, vae).to(device, precision)
        with Progress(console=console, disable=console.quiet, transient=True) as bar:
            task = bar.add_task("one process", total=4 * PASSES)
            alone = launch.on_rank0(group, lambda: one_and_tiles(vae, pixels, lambda: bar.advance(task)))
            bar.update(task, description=f"{group.size()} rank(s)")
            sharded = across_ranks(vae, pixels, group, output_layout, lambda: bar.advance(task))
        if alone is None:
            return
        single, tiled = alone
        where = f"{torch.get_num_threads()} CPU thread(s)" if device.type == "cpu" else "a GPU"
        height, width = pixels.shape[-2:]
        title = f"{height} x {width}, {dtype}, {group.size()} rank(s) of {where} each"
        console.print(cost_table(title, single, sharded))
        console.print(
            f"Largest difference from one process: {largest_difference(sharded.picture, single.picture):.1e} "
            f"in the picture (-1 to 1),\n"
            f"{largest_difference(sharded.latents, single.latents):.1e} in the latents "
            f"({single.latents.min():.1f} to {single.latents.max():.1f}).\n"
            f"PSNR against the photograph: {psnr(sharded.picture, pixels):.2f} dB, "
            f"one process {psnr(single.picture, pixels):.2f} dB.\n"
            f"In tiles on one device: {largest_difference(tiled, single.picture):.1e} from one process, with seams "
            f"(norms and attention see a tile; large autoencoders hide more of it than this small one)."
        )
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"decode_vae_{group.size()}_ranks.png"
        side_by_side(pixels, sharded.picture, single.picture, tiled, group.size()).save(path)
        console.print(f"Pictures and differences side by side: {path}")


if __name__ == "__main__":
    app()
