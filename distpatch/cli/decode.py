"""``distpatch decode``: latents in, a picture or a clip out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from distpatch.cli import files
from distpatch.cli import options as o
from distpatch.cli.autoencoder import check_input, decoded, difference, run, summary
from distpatch.cli.session import first, session

OUTPUTS = (".png", ".tif", ".tiff", ".npy", *files.CLIPS)


def decode(
    model: o.Folder,
    latents: Annotated[Path, typer.Argument(help="Tensor file (.npy, .pt, .safetensors), as `encode` writes.")],
    output: Annotated[Path, typer.Argument(help="Picture (.png, .tif), clip (.mp4, .mkv) or .npy.")],
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
    """Decode latents to a picture or a clip; no rank ever holds all of it.

    Examples:

        distpatch decode vae/ latents.npy picture.png

        torchrun --nproc_per_node=8 -m distpatch decode vae/ latents.safetensors clip.mp4 --dtype bfloat16
    """
    with session(as_json=as_json, device=device, threads=threads, timeout=timeout) as here:
        precision = getattr(torch, dtype)

        def load() -> tuple[nn.Module, Tensor]:
            files.check_output(output, OUTPUTS)
            given = files.read_tensor(latents, key)
            loaded = files.load_model(model, precision)
            check_input(loaded, "decode", given.shape, str(latents))
            return loaded, unscale(loaded, given) if scaled else given

        vae, given = first(here, load)
        vae, given = vae.to(here.device), given.to(here.device, precision)
        result, numbers = run(here, vae, decoded, given, "decoding")
        files.write_decoded(result, output, fps)
        numbers = {"command": "decode", "output": str(output), **here.where(), **numbers}
        if check:
            numbers["error"] = difference(here, vae, decoded, given, result)
        here.report(numbers, summary(numbers, "Decoded", output))


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
