"""Files that the commands read and write: pictures, clips, tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from torch import Tensor

import distpatch
from distpatch.cli.models import needed

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
TENSORS = (".npy", ".pt", ".safetensors")
CLIPS = (".mp4", ".mkv", ".webm", ".mov")
WRITTEN = (".png", ".tif", ".tiff", ".npy", *CLIPS)  # of pictures and clips
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
TURNED, ORIENTATION = (5, 6, 7, 8), 0x0112  # EXIF: rows are columns
Fit = Literal["refuse", "crop", "pad", "keep"]


def read_tensor(path: Path, key: str | None = None, *, least: int = 4) -> Tensor:
    """A tensor of at least ``least`` dims from .npy, .pt or .safetensors (``key``: which of several).

    Floating point, but for volumes (``least=3``).
    """
    check_exists(path)
    try:
        suffix = path.suffix.lower()
        if suffix == ".npy":
            found = {"": torch.from_numpy(needed("numpy").load(path, allow_pickle=False))}
        elif suffix == ".pt":
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            found = loaded if isinstance(loaded, dict) else {"": loaded}
        elif suffix == ".safetensors":
            found = needed("safetensors.torch").load_file(path)
        else:
            raise typer.BadParameter(f"{path}: tensors are read from {', '.join(TENSORS)}")
    except typer.BadParameter:
        raise
    except Exception as error:  # whatever the file's library raises for a broken file
        raise typer.BadParameter(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    tensor = _choose(path, found, key)
    if tensor.ndim < least or (least == 4 and not tensor.is_floating_point()):
        raise typer.BadParameter(
            f"{path}: a tensor is (B, C, H, W) or (B, C, T, H, W) of floating-point numbers; this one is "
            f"{tuple(tensor.shape)} {tensor.dtype}"
        )
    return tensor


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """(1, 3, H, W), bytes, upright. ``size``: scaled to cover so many rows and columns, and cut to them."""
    np, image, ops = needed("numpy"), needed("PIL.Image"), needed("PIL.ImageOps")
    with _picture(path) as opened:
        picture = ops.exif_transpose(opened).convert("RGB")
    if size is not None:
        picture = ops.fit(picture, size[::-1], image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def read_clip(path: Path) -> Tensor:
    """(1, 3, T, H, W), bytes: all frames of a file's first video."""
    np = needed("numpy")
    with _clip(path) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    if not frames:
        raise typer.BadParameter(f"{path}: there is no frame in it")
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None]


def read_pixels(path: Path, size: tuple[int, int] | None, key: str | None) -> Tensor:
    """A picture's or clip's bytes, or a tensor as it is in its file."""
    suffix = path.suffix.lower()
    if size is not None and suffix not in PICTURES:
        raise typer.BadParameter(f"{path}: --size is for pictures")
    if suffix in PICTURES:
        return read_picture(path, size)
    return read_clip(path) if suffix in CLIPS else read_tensor(path, key)


def shape_of(path: Path, size: tuple[int, int] | None = None, key: str | None = None) -> tuple[int, ...]:
    """The shape that reading it would give, from the file's header where it has one."""
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        with _picture(path) as picture:
            turned = picture.getexif().get(ORIENTATION) in TURNED
            return (1, 3, *(size or (picture.size if turned else picture.size[::-1])))
    if suffix in CLIPS:
        with _clip(path) as file:
            video = file.streams.video[0]
            return (1, 3, video.frames or sum(1 for _ in file.decode(video)), video.height, video.width)
    check_exists(path)
    if suffix == ".npy":
        return tuple(needed("numpy").load(path, mmap_mode="r", allow_pickle=False).shape)
    return tuple(read_tensor(path, key, least=3).shape)


def fitted(shape: tuple[int, ...], factor: int | None, fit: Fit, path: Path) -> tuple[int, int]:
    """Rows and columns, as multiples of the model's factor.

    Raises ``typer.BadParameter`` where they are none and ``fit`` refuses.
    """
    height, width = shape[-2:]
    if factor is None or fit == "keep" or (height % factor == 0 and width % factor == 0):
        return height, width
    if fit == "refuse":
        raise typer.BadParameter(
            f"{path}: {height} x {width} pixels are no multiple of {factor}, of which a latent is made: "
            "--fit crop, pad or keep (as the model rounds it), or --size"
        )
    if fit == "crop" and min(height, width) < factor:
        raise typer.BadParameter(f"{path}: {height} x {width} pixels are fewer than the {factor} of a latent")
    add = 0 if fit == "crop" else factor - 1
    return (height + add) // factor * factor, (width + add) // factor * factor


def cut_or_padded(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """So many rows and columns, from the top left: the others are cut off, what is missing repeats the last one."""
    for dim, size in ((-2, rows), (-1, columns)):
        if pixels.shape[dim] != size:
            pixels = pixels.index_select(dim, torch.arange(size).clamp(max=pixels.shape[dim] - 1))
    return pixels


def write_pixels(
    result: Tensor, path: Path, value_range: tuple[float, float], fps: float = 24, *, alone: bool = True
) -> None:
    """A sharded picture or clip, each rank its part. Every rank calls it. ``alone``: it is the only one."""
    if path.suffix == ".npy":
        distpatch.to_memmap(result, path)
    elif path.suffix.lower() in CLIPS:
        distpatch.save_video(result, path, fps=fps, value_range=value_range, progress=alone)
    else:
        one = result[:, :, 0] if result.ndim == 5 and result.shape[2] == 1 else result
        distpatch.save_image(one, path, value_range=value_range, progress=alone)


def write_tensor(tensor: Tensor, path: Path, key: str) -> None:
    """A plain tensor, by one process."""
    if path.suffix == ".npy":
        plain = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        needed("numpy").save(path, plain.cpu().numpy())
    elif path.suffix == ".pt":
        torch.save(tensor.cpu(), path)
    else:
        needed("safetensors.torch").save_file({key: tensor.cpu().contiguous()}, path)


@contextmanager
def _picture(path: Path) -> Iterator[Any]:
    """A picture's file, open. Raises ``typer.BadParameter`` where it cannot be read, or has more bits than a byte."""
    check_exists(path)
    try:
        with needed("PIL.Image").open(path) as picture:
            if picture.mode not in EIGHT_BITS:
                raise typer.BadParameter(
                    f"{path}: a picture has 8 bits a sample; this is of mode {picture.mode}: give its numbers as .npy"
                )
            yield picture
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for a broken file
        raise typer.BadParameter(f"{path}: cannot be read as a picture: {error}") from error


@contextmanager
def _clip(path: Path) -> Iterator[Any]:
    """A clip's file, open. Raises ``typer.BadParameter`` where it has no video that can be read."""
    check_exists(path)
    av = needed("av")
    try:
        with av.open(str(path)) as file:
            yield file
    except (av.FFmpegError, IndexError) as error:
        raise typer.BadParameter(f"{path}: cannot be read as a clip: {error}") from error


def check_exists(path: Path) -> None:
    if not path.is_file():
        raise typer.BadParameter(f"{path}: there is no such file")


def _choose(path: Path, found: dict[str, Any], key: str | None) -> Tensor:
    if key is None and len(found) != 1:
        raise typer.BadParameter(f"{path}: which of its tensors? --key, one of: {', '.join(found) or 'none'}")
    value = found.get(key) if key is not None else next(iter(found.values()))
    if not isinstance(value, Tensor):
        raise typer.BadParameter(f"{path}: no tensor {key or ''} in it; it has: {', '.join(map(str, found))}")
    return value
