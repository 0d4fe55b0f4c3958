"""``distpatch segment``: pictures or volumes in, the class of each pixel out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import distpatch
from distpatch.cli import files
from distpatch.cli import options as o
from distpatch.cli.batch import Request, Team
from distpatch.cli.models import needed
from distpatch.cli.nets import Net, prepared
from distpatch.cli.session import session, told
from distpatch.cli.work import Work, run

WRITES = (".png", ".tif", ".tiff", ".npy")
BYTE = 256  # classes that fit in one


def segment(
    model: o.NetArgument,
    sources: Annotated[
        list[Path],
        typer.Argument(
            help=f"{o.SourcesHelp}: pictures, or tensors as the net takes them; volumes (D, H, W), (1, C, D, H, W)."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Classes: .png, .tif or .npy; of several inputs their folder.")],
    palette: Annotated[bool, typer.Option("--palette", help="Colours in place of numbers (.png, .tif).")] = False,
    suffix: o.SuffixOption = None,
    rows: o.RowsOption = None,
    resume: o.ResumeOption = False,
    dry_run: o.DryRunOption = False,
    key: o.KeyOption = None,
    dtype: o.DtypeOption = "float32",
    device: o.DeviceOption = None,
    threads: o.ThreadsOption = None,
    timeout: o.TimeoutOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Find the class of each pixel or voxel; each rank finds those of its rows, and none holds all logits.

    A picture is not scaled; it is normalised as the model's preprocessor_config.json says, and in [0, 1] without one.
    Logits of fewer rows and columns, such as SegFormer's, are interpolated to those of the picture.

    Examples:

        distpatch segment segformer/ photograph.jpg classes.png --palette

        torchrun --nproc_per_node=8 -m distpatch segment unet3d.pt2 scans/ classes/ --suffix .npy --rows 4
    """
    precision, net = getattr(torch, dtype), Net(model, "AutoModelForSemanticSegmentation")
    request = Request(sources, output, suffix, rows, resume, dry_run)

    def read(model: nn.Module, path: Path) -> Tensor:
        if path.suffix.lower() in files.PICTURES:
            return files.read_picture(path)
        found = files.read_tensor(path, key, least=3).float()
        return found[None, None] if found.ndim == 3 else found

    def shape(model: Any, path: Path) -> tuple[int, ...]:
        found = files.shape_of(path, key=key)
        return (1, 1, *found) if len(found) == 3 else found

    with session(as_json=as_json, device=device, threads=threads, timeout=timeout) as here:
        how = told(here, net.values)
        work = Work(
            **{"command": "segment", "done": "Segmented", "writes": WRITES, "dtype": precision},
            reads=(*files.PICTURES, *files.TENSORS),
            load=lambda: net.with_weights(precision, here.device),
            build=net.build(precision),
            read=read,
            shape=shape,
            values=lambda pixels: prepared(pixels, how),
            call=classes,
            write=lambda found, path, team, alone: write(found, path, team, palette),
        )
        run(here, request, work)


def classes(model: nn.Module, given: Tensor) -> Tensor:
    """(B, H, W) or (B, D, H, W): the class with the largest logit; bytes where these can count the classes."""
    output: Any = model(given)
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    if logits.shape[2:] != given.shape[2:]:
        mode = "bilinear" if given.ndim == 4 else "trilinear"
        logits = F.interpolate(logits, size=given.shape[2:], mode=mode, align_corners=False)
    return torch.argmax(logits, 1).to(torch.uint8 if logits.shape[1] <= BYTE else torch.int32)


def write(found: Tensor, path: Path, team: Team, palette: bool) -> None:
    """Classes of a picture or volume, each rank its rows. Raises ``LayoutError`` where a file cannot hold them."""
    if found.shape[0] != 1:
        raise distpatch.LayoutError(f"one picture is segmented at a time; this is a batch of {found.shape[0]}")
    if path.suffix == ".npy":
        distpatch.to_memmap(found[0], path)
        return
    if found.ndim != 3 or (path.suffix == ".png" and found.dtype != torch.uint8 and not palette):
        raise distpatch.LayoutError(
            f"classes of shape {tuple(found.shape)} {found.dtype} do not fit in a {path.suffix}: --suffix .npy"
        )
    distpatch.save_image(coloured(found, team) if palette else found, path, value_range=None)


def coloured(found: Tensor, team: Team) -> Tensor:
    """(3, H, W) bytes: a colour a class, of twenty, which then come again; each rank those of its rows."""
    colours = needed("matplotlib").colormaps["tab20"].colors
    table = (torch.tensor(colours) * 255).round().to(torch.uint8)
    assert isinstance(found, distpatch.PatchTensor)
    rows = table[found.local[0].cpu().long() % len(colours)].movedim(-1, 0).contiguous()
    return distpatch.PatchTensor.from_local(rows, team.group, dim=-2, bounds=found.row_layout.bounds)
