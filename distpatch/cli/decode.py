"""``distpatch decode``: latents in, pictures or clips out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from distpatch.cli import files
from distpatch.cli import options as o
from distpatch.cli.autoencoder import check_input, decoded
from distpatch.cli.batch import Request
from distpatch.cli.models import locate
from distpatch.cli.session import session
from distpatch.cli.work import Work, run


def decode(
    model: o.Folder,
    latents: Annotated[
        list[Path],
        typer.Argument(help=f"{o.SourcesHelp}: tensors (.npy, .pt, .safetensors), as `encode` writes them."),
    ],
    output: Annotated[
        Path, typer.Argument(help="Picture (.png, .tif), clip (.mp4, .mkv) or .npy; of several inputs their folder.")
    ],
    suffix: o.SuffixOption = None,
    rows: o.RowsOption = None,
    resume: o.ResumeOption = False,
    dry_run: o.DryRunOption = False,
    key: o.KeyOption = None,
    scaled: Annotated[
        bool, typer.Option(help="The latents are a pipeline's: undo the scaling that the model's config names.")
    ] = False,
    fps: Annotated[float, typer.Option(min=0.1, help="Of a clip.")] = 24,
    dtype: o.DtypeOption = "float32",
    device: o.DeviceOption = None,
    threads: o.ThreadsOption = None,
    timeout: o.TimeoutOption = None,
    check: o.CheckOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Decode latents to pictures or clips; no rank ever holds all of one.

    Several inputs are named as they were, and become .png if --suffix says nothing else; one that fails is named, the
    others go on, and the exit code is 1.

    Examples:

        distpatch decode vae/ latents.npy picture.png

        torchrun --nproc_per_node=8 -m distpatch decode vae/ latents.safetensors clip.mp4 --dtype bfloat16

        torchrun --nproc_per_node=8 -m distpatch decode vae/ latents/ pictures/ --rows 2 --resume
    """
    precision = getattr(torch, dtype)
    request = Request(latents, output, suffix, rows, resume, dry_run)

    def shape(vae: nn.Module, path: Path) -> tuple[int, ...]:
        found = files.shape_of(path, key=key)
        check_input(vae, "decode", found, str(path))
        return found

    def read(vae: nn.Module, path: Path) -> Tensor:
        given = files.read_tensor(path, key)
        check_input(vae, "decode", given.shape, str(path))
        return unscale(vae, given) if scaled else given

    work = Work(
        **{"command": "decode", "done": "Decoded", "reads": files.TENSORS, "writes": files.WRITTEN, "dtype": precision},
        load=lambda: locate(model).with_weights(precision),
        build=lambda: locate(model).build(precision),
        read=read,
        shape=shape,
        values=lambda given: given,
        call=decoded,
        write=lambda result, path, team, alone: files.write_pixels(result, path, (-1, 1), fps, alone=alone),
        method="decode",
    )
    with session(as_json=as_json, device=device, threads=threads, timeout=timeout) as here:
        run(here, request, work, check=check)


def unscale(model: nn.Module, latents: Tensor) -> Tensor:
    """A pipeline's latents as ``decode`` takes them. Raises ``typer.BadParameter`` where the config names no scale."""
    config: Any = getattr(model, "config", {})
    mean, std = config.get("latents_mean"), config.get("latents_std")
    factor = config.get("scaling_factor")
    if mean is not None and std is not None:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        return latents * torch.tensor(std).view(shape) / (factor or 1) + torch.tensor(mean).view(shape)
    if factor is None:
        raise typer.BadParameter(f"--scaled: the config of this {type(model).__name__} has no scaling_factor")
    return latents / factor + (config.get("shift_factor") or 0)
