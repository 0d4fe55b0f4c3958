"""``distpatch upscale``: pictures in, larger pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from distpatch.cli import files
from distpatch.cli import options as o
from distpatch.cli.batch import Request
from distpatch.cli.nets import Net
from distpatch.cli.session import session
from distpatch.cli.work import Work, run

WRITES = (".png", ".tif", ".tiff", ".npy")


def upscale(
    model: o.NetArgument,
    sources: Annotated[list[Path], typer.Argument(help=f"{o.SourcesHelp}: pictures, or tensors in [0, 1].")],
    output: Annotated[Path, typer.Argument(help="Picture (.png, .tif) or .npy; of several inputs their folder.")],
    suffix: o.SuffixOption = None,
    rows: o.RowsOption = None,
    resume: o.ResumeOption = False,
    dry_run: o.DryRunOption = False,
    key: o.KeyOption = None,
    dtype: o.DtypeOption = "float32",
    device: o.DeviceOption = None,
    threads: o.ThreadsOption = None,
    timeout: o.TimeoutOption = None,
    check: o.CheckOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Scale pictures up by a net; no rank ever holds all of one, and there are no tiles.

    The net takes (B, 3, H, W) in [0, 1] and gives (B, 3, sH, sW): a Swin2SR of transformers, or any program.

    Examples:

        distpatch upscale swin2sr/ photograph.jpg large.png

        torchrun --nproc_per_node=8 -m distpatch upscale esrgan.pt2 photos/ large/ --rows 2 --resume
    """
    precision, net = getattr(torch, dtype), Net(model, "AutoModelForImageToImage")
    request = Request(sources, output, suffix, rows, resume, dry_run)
    with session(as_json=as_json, device=device, threads=threads, timeout=timeout) as here:
        work = Work(
            **{"command": "upscale", "done": "Scaled up to", "writes": WRITES, "dtype": precision},
            reads=(*files.PICTURES, *files.TENSORS),
            load=lambda: net.with_weights(precision, here.device),
            build=net.build(precision),
            read=lambda model, path: files.read_pixels(path, None, key),
            shape=lambda model, path: files.shape_of(path, key=key),
            values=lambda pixels: pixels / 255,
            call=enlarged,
            write=lambda result, path, team, alone: files.write_pixels(result, path, (0, 1), alone=alone),
        )
        run(here, request, work, check=check)


def enlarged(model: nn.Module, pixels: Tensor) -> Tensor:
    """The picture; of a model of transformers out of its output class.

    A net of windows takes whole ones alone: what is missing is mirrored, and cut off the result.
    """
    window = getattr(getattr(model, "config", None), "window_size", 1)
    height, width = pixels.shape[-2:]
    given = pixels
    if height % window or width % window:
        given = F.pad(pixels, (0, -width % window, 0, -height % window), "reflect")
    output: Any = model(given)
    enlarged: Tensor = output.reconstruction if hasattr(output, "reconstruction") else output
    scale = enlarged.shape[-1] // given.shape[-1]
    return enlarged if given is pixels else enlarged[..., : height * scale, : width * scale]
