"""Files that the commands read and write: a model's folder, pictures, tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

import distpatch

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
TENSORS = (".npy", ".pt", ".safetensors")
CLIPS = (".mp4", ".mkv", ".webm", ".mov")


def model_class(folder: Path) -> tuple[type[Any], Path]:
    """The class that a folder's config.json names, and the folder that has it: it, or its ``vae``.

    Raises ``typer.BadParameter`` where the folder is not one that diffusers' ``save_pretrained`` wrote.
    """
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder}: there is no such folder")
    where = folder if (folder / "config.json").is_file() else folder / "vae"
    config = where / "config.json"
    if not config.is_file():
        raise typer.BadParameter(f"{folder}: no config.json in it or in its vae folder; save_pretrained writes one")
    try:
        name = json.loads(config.read_text()).get("_class_name")
    except ValueError as error:
        raise typer.BadParameter(f"{config}: not JSON: {error}") from error
    diffusers = _needed("diffusers")
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise typer.BadParameter(f"{config}: diffusers {diffusers.__version__} has no model {name!r} (_class_name)")
    return found, where


def load_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """A model of diffusers with its weights, ready to run."""
    found, where = model_class(folder)
    try:
        model: nn.Module = found.from_pretrained(where, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"{where}: cannot load a {found.__name__}: {error}") from error
    return model.eval().requires_grad_(False)


def read_tensor(path: Path, key: str | None = None) -> Tensor:
    """A tensor of at least 4 dims, floating point, from .npy, .pt or .safetensors (``key``: which of several)."""
    _check_exists(path)
    try:
        if path.suffix == ".npy":
            found = {"": torch.from_numpy(_needed("numpy").load(path, allow_pickle=False))}
        elif path.suffix == ".pt":
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            found = loaded if isinstance(loaded, dict) else {"": loaded}
        elif path.suffix == ".safetensors":
            _needed("safetensors")
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            raise typer.BadParameter(f"{path}: tensors are read from {', '.join(TENSORS)}")
    except typer.BadParameter:
        raise
    except Exception as error:  # whatever the file's library raises for a broken file
        raise typer.BadParameter(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    tensor = _choose(path, found, key)
    if tensor.ndim < 4 or not tensor.is_floating_point():
        raise typer.BadParameter(
            f"{path}: a tensor is (B, C, H, W) or (B, C, T, H, W) of floating-point numbers; this one is "
            f"{tuple(tensor.shape)} {tensor.dtype}"
        )
    return tensor


def read_picture(path: Path) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    _check_exists(path)
    np, image = _needed("numpy"), _needed("PIL.Image")
    try:
        picture = image.open(path).convert("RGB")
    except OSError as error:
        raise typer.BadParameter(f"{path}: cannot be read as a picture: {error}") from error
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Before hours of work: a file of this name can be written."""
    if path.suffix.lower() not in suffixes:
        raise typer.BadParameter(f"{path}: the output is one of {', '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path}: there is no folder {path.absolute().parent}")


def write_decoded(result: Tensor, path: Path, fps: float) -> None:
    """A sharded picture or clip in [-1, 1], each rank its part. Every rank calls it."""
    if path.suffix == ".npy":
        distpatch.to_memmap(result, path)
    elif path.suffix.lower() in CLIPS:
        distpatch.save_video(result, path, fps=fps, value_range=(-1, 1), progress=True)
    else:
        one = result[:, :, 0] if result.ndim == 5 and result.shape[2] == 1 else result
        distpatch.save_image(one, path, value_range=(-1, 1), progress=True)


def write_tensor(tensor: Tensor, path: Path, key: str) -> None:
    """A plain tensor, by one process."""
    if path.suffix == ".npy":
        plain = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        _needed("numpy").save(path, plain.cpu().numpy())
    elif path.suffix == ".pt":
        torch.save(tensor.cpu(), path)
    else:
        from safetensors.torch import save_file

        save_file({key: tensor.cpu().contiguous()}, path)


def _choose(path: Path, found: dict[str, Any], key: str | None) -> Tensor:
    if key is None and len(found) != 1:
        raise typer.BadParameter(f"{path}: which of its tensors? --key, one of: {', '.join(found) or 'none'}")
    value = found.get(key) if key is not None else next(iter(found.values()))
    if not isinstance(value, Tensor):
        raise typer.BadParameter(f"{path}: no tensor {key or ''} in it; it has: {', '.join(map(str, found))}")
    return value


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise typer.BadParameter(f"{path}: there is no such file")


def _needed(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"this needs {name.partition('.')[0]}: pip install 'distpatch[cli]'") from error
