"""``distpatch plan``: what a run on many ranks will take, on this machine and without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

import distpatch
from distpatch.cli import options as o
from distpatch.cli.autoencoder import check_input, stable_diffusion
from distpatch.cli.models import locate
from distpatch.cli.session import FAILED, WRONG_INPUT, parse_shape, session

GIB = 1 << 30
DRAWN = (1, 2, 4, 8, 16, 32, 64)  # world sizes of a plot, where none are given


def plan(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="Folder or hub id of a diffusers model: its config is read; Stable Diffusion's autoencoder if none."
        ),
    ] = None,
    shape: o.ShapeOption = "1,4,64,64",
    world_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Ranks to plan for (8); several times for a line each.")
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(help="Ranks along height and width, such as 8x8; 'auto': what of --world-size sends least."),
    ] = None,
    method: Annotated[Literal["decode", "encode", "forward"], typer.Option(help="What is called.")] = "decode",
    dtype: o.DtypeOption = "float32",
    device: Annotated[str, typer.Option(help="Whose rates make the estimate of time; 'cpu' for no estimate.")] = "H100",
    host_us: Annotated[
        float | None,
        typer.Option(min=0, help="Microseconds in which the host launches a kernel, if known."),
    ] = None,
    link: Annotated[str | None, typer.Option(help="Between ranks; the device's own if not given.")] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Use the rates of this machine, and under torchrun of its links, measured."),
    ] = False,
    fits: Annotated[
        float | None,
        typer.Option(min=0, help="GiB of a rank: find the fewest ranks, or the fewest of those given, that fit."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory and time against ranks (1 to 64, or those given), here.")
    ] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Memory, bytes and messages of a run on N ranks, from fake tensors: no GPU, and no weights are read.

    Exits with 1 where no number of ranks, or none of those given, fits.

    Examples:

        distpatch plan --shape 1,4,1024,1024 --world-size 8

        distpatch plan vae/ --shape 1,4,512,512 --fits 16

        distpatch plan --shape 1,4,512,512 --mesh 8x8

        distpatch plan wan/ --shape 1,16,21,90,160 --world-size 1 --world-size 2 --world-size 4 --json

        torchrun --nproc_per_node=2 -m distpatch plan --calibrate --plot scaling.png
    """
    size, precision = parse_shape(shape), getattr(torch, dtype)
    with session(as_json=as_json) as here:
        rates: Any = {"device": device, "link": link}
        if calibrate:
            measured = distpatch.calibrate(here.group, device=here.device)
            rates = {"device": measured[0], "link": link or measured[1]}
        if not here.is_first:
            return
        with torch.device("meta"):
            given = torch.empty(size, dtype=precision)
            built = locate(model).build(precision) if model else stable_diffusion(precision)
        check_input(built, method, size, f"--shape {shape}")
        host = None if host_us is None else 1e-6 * host_us
        sizes, options = _ranks(world_size, mesh)
        call = {"options": options, "method": None if method == "forward" else method, "host": host, **rates}
        try:
            with here.notes.status(f"planning {method} of {tuple(size)}"):
                planned, smallest = _planned(built, given, sizes, fits, plot is not None, call)
        except (ValueError, KeyError) as error:  # a device, a link or a shape that it does not take
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(WRONG_INPUT) from error
        if planned is not None:
            typer.echo(planned.to_json() if as_json else planned.table())
        if plot is not None and isinstance(planned, distpatch.Scaling):
            planned.plot(plot)
        if fits is not None:
            typer.echo(
                f"fits in {fits:g} GiB: {smallest.world_size if smallest else 'none of these'} rank(s)", err=True
            )
            if smallest is None:
                raise typer.Exit(FAILED)


def _ranks(sizes: list[int] | None, mesh: str | None) -> tuple[Sequence[Any] | None, dict[str, Any]]:
    """World sizes, and the options of ``convert_model`` that go with them."""
    if mesh is None or mesh == "auto":
        return sizes, {} if mesh is None else {"dim": mesh}
    axes = mesh.split("x")
    if len(axes) != 2 or not all(n.isdigit() for n in axes) or sizes:
        raise typer.BadParameter(f"--mesh is such as 8x8, in place of --world-size, or 'auto'; got {mesh}")
    return [tuple(map(int, axes))], {"dim": (-2, -1)}


def _planned(
    model: nn.Module,
    given: torch.Tensor,
    sizes: Sequence[Any] | None,
    fits: float | None,
    drawn: bool,
    call: dict[str, Any],
) -> tuple[distpatch.Plan | distpatch.Scaling | None, distpatch.Plan | None]:
    """What is printed, and the plan that fits."""
    if drawn or (sizes and (len(sizes) > 1 or fits is not None)):
        several = distpatch.scaling(model, given, world_sizes=sizes or DRAWN, **call)
        return several, None if fits is None else several.smallest(fits * GIB)
    if fits is not None:
        found = distpatch.smallest_plan(model, given, memory_bytes=fits * GIB, **call)
        return found, found
    return distpatch.plan(model, given, world_size=(sizes or [8])[0], **call), None
