"""``distpatch encode``: pictures, clips or tensors in, latents out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import distpatch
from distpatch.cli import files
from distpatch.cli import options as o
from distpatch.cli.autoencoder import check_input, encoded, takes_clips
from distpatch.cli.batch import Request, Team
from distpatch.cli.models import factor_of, locate
from distpatch.cli.session import parse_size, session
from distpatch.cli.work import Work, run
from distpatch.comm.together import together

READS = (*files.PICTURES, *files.CLIPS, *files.TENSORS)
WRITES = (".safetensors", ".npy", ".pt")


def encode(
    model: o.Folder,
    sources: Annotated[
        list[Path],
        typer.Argument(
            help=f"{o.SourcesHelp}: pictures (.png, .jpg, .webp, .tif), clips (.mp4, .mkv), "
            "or tensors in [-1, 1] (.npy, .pt, .safetensors)."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Latents: .safetensors, .npy or .pt; of several inputs their folder.")],
    suffix: o.SuffixOption = None,
    rows: o.RowsOption = None,
    resume: o.ResumeOption = False,
    dry_run: o.DryRunOption = False,
    size: o.SizeOption = None,
    fit: Annotated[
        files.Fit,
        typer.Option(
            help="Where rows or columns are no multiple of the model's factor: refuse, cut off the last ones, "
            "repeat the last one, or keep it to what the model does."
        ),
    ] = "refuse",
    key: o.KeyOption = None,
    dtype: o.DtypeOption = "float32",
    device: o.DeviceOption = None,
    threads: o.ThreadsOption = None,
    timeout: o.TimeoutOption = None,
    check: o.CheckOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Encode pictures, or clips, to latents: the mode, not a sample, and not scaled.

    Several inputs are named as they were; one that fails is named, the others go on, and the exit code is 1.

    Examples:

        distpatch encode vae/ photograph.jpg latents.npy

        torchrun --nproc_per_node=2 -m distpatch encode vae/ clip.mp4 latents.safetensors --json

        torchrun --nproc_per_node=8 -m distpatch encode vae/ photos/ latents/ --rows 2 --size 1024 --resume
    """
    wanted, precision = parse_size(size), getattr(torch, dtype)
    request = Request(sources, output, suffix, rows, resume, dry_run)

    def shape(vae: nn.Module, path: Path, found: tuple[int, ...]) -> tuple[int, ...]:
        """As it is encoded."""
        if len(found) == 4 and path.suffix.lower() in files.PICTURES and takes_clips(vae, "encoder"):
            found = (*found[:2], 1, *found[2:])  # a clip of one frame
        check_input(vae, "encode", found, str(path))
        return (*found[:-2], *files.fitted(found, factor_of(vae), fit, path))

    def read(vae: nn.Module, path: Path) -> Tensor:
        pixels = files.read_pixels(path, wanted, key)
        final = shape(vae, path, tuple(pixels.shape))
        return files.cut_or_padded(pixels, *final[-2:]).reshape(final)

    def write(latents: Tensor, path: Path, team: Team, alone: bool) -> None:
        whole = distpatch.gather(latents)

        def save() -> tuple[None, str]:
            if team.comm.rank == 0:
                files.write_tensor(whole, path, key or "latents")
            return None, ""

        together(team.comm, "write", save, f"{path} could not be written")

    work = Work(
        **{"command": "encode", "done": "Encoded to", "reads": READS, "writes": WRITES, "dtype": precision},
        load=lambda: locate(model).with_weights(precision),
        build=lambda: locate(model).build(precision),
        read=read,
        shape=lambda vae, path: shape(vae, path, files.shape_of(path, wanted, key)),
        values=lambda pixels: pixels / 127.5 - 1,
        call=encoded,
        write=write,
        method="encode",
    )
    with session(as_json=as_json, device=device, threads=threads, timeout=timeout) as here:
        run(here, request, work, check=check)
