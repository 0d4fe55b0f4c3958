"""``distpatch encode``: a picture or a tensor in, latents out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import distpatch
from distpatch import launch
from distpatch.cli import files
from distpatch.cli import options as o
from distpatch.cli.autoencoder import check_input, difference, encoded, run, summary, takes_clips
from distpatch.cli.session import first, session


def encode(
    model: o.Folder,
    source: Annotated[
        Path, typer.Argument(help="Picture (.png, .jpg, .webp, .tif), or tensor in [-1, 1] (.npy, .pt, .safetensors).")
    ],
    output: Annotated[Path, typer.Argument(help="Latents: .npy, .pt or .safetensors.")],
    key: o.KeyOption = None,
    dtype: o.DtypeOption = "float32",
    device: o.DeviceOption = None,
    threads: o.ThreadsOption = None,
    timeout: o.TimeoutOption = None,
    check: o.CheckOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Encode a picture, or a clip as a tensor, to latents: the mode, not a sample, and not scaled.

    Examples:

        distpatch encode vae/ photograph.jpg latents.npy

        torchrun --nproc_per_node=2 -m distpatch encode vae/ clip.pt latents.safetensors --json
    """
    with session(as_json=as_json, device=device, threads=threads, timeout=timeout) as here:
        precision = getattr(torch, dtype)

        def load() -> tuple[nn.Module, Tensor]:
            files.check_output(output, files.TENSORS)
            is_picture = source.suffix.lower() in files.PICTURES
            given = files.read_picture(source) if is_picture else files.read_tensor(source, key)
            loaded = files.load_model(model, precision)
            if is_picture and takes_clips(loaded, "encoder"):
                given = given.unsqueeze(2)  # a clip of one frame
            check_input(loaded, "encode", given.shape, str(source))
            return loaded, given

        vae, given = first(here, load)
        vae, given = vae.to(here.device), given.to(here.device, precision)
        result, numbers = run(here, vae, encoded, given, "encoding")
        latents = distpatch.gather(result)
        launch.on_rank0(here.group, lambda: files.write_tensor(latents, output, key or "latents"))
        numbers = {"command": "encode", "output": str(output), **here.where(), **numbers}
        if check:
            numbers["error"] = difference(here, vae, encoded, given, result)
        here.report(numbers, summary(numbers, "Encoded to", output))
