"""``distpatch plan``: what a run on many ranks will take, on this machine and without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

import distpatch
from distpatch.cli import files
from distpatch.cli import options as o
from distpatch.cli.session import FAILED, WRONG_INPUT, parse_shape

GIB = 1 << 30


def plan(
    model: o.Folder,
    shape: o.ShapeOption = "1,4,64,64",
    world_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Ranks to plan for (8); several times for a line each.")
    ] = None,
    method: Annotated[Literal["decode", "encode", "forward"], typer.Option(help="What is called.")] = "decode",
    dtype: o.DtypeOption = "float32",
    device: Annotated[str, typer.Option(help="Whose rates make the estimate of time; 'cpu' for no estimate.")] = "H100",
    link: Annotated[str | None, typer.Option(help="Between ranks; the device's own if not given.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine's rates, and use them.")] = False,
    fits: Annotated[
        float | None, typer.Option(min=0, help="GiB of a rank: find the fewest of the given ranks that fit in them.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw memory and time against ranks, here.")] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Memory, bytes and messages of a run on N ranks, from fake tensors: no GPU, and no weights are read.

    Exits with 1 where none of the given numbers of ranks fits.

    Examples:

        distpatch plan vae/ --shape 1,4,1024,1024 --world-size 8

        distpatch plan wan/ --shape 1,16,21,90,160 --world-size 1 --world-size 2 --world-size 4 --fits 24 --json
    """
    found, where = files.model_class(model)
    precision = getattr(torch, dtype)
    with torch.device("meta"):
        built = found.from_config(found.load_config(where)).eval().requires_grad_(False)
        given = torch.empty(parse_shape(shape), dtype=precision)
    built = nn.Module.to(built, precision)  # diffusers' own warns of weights to be kept in fp32; here are none
    api: Any = distpatch
    options: dict[str, Any] = {
        "method": None if method == "forward" else method,
        "device": api.calibrate() if calibrate else device,
        "link": link,
    }
    sizes = world_size or [8]
    try:
        if len(sizes) == 1 and fits is None and plot is None:
            planned = api.plan(built, given, world_size=sizes[0], **options)
        else:
            planned = api.scaling(built, given, world_sizes=sizes, **options)
    except (ValueError, KeyError) as error:  # a device, a link or a shape that it does not take
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(WRONG_INPUT) from error
    typer.echo(planned.to_json() if as_json else planned.table())
    if plot is not None:
        planned.plot(plot)
    if fits is not None:
        smallest = planned.smallest(fits * GIB)
        typer.echo(f"fits in {fits:g} GiB: {smallest.world_size if smallest else 'none of these'} rank(s)", err=True)
        if smallest is None:
            raise typer.Exit(FAILED)
