"""``distpatch plan``: what a run on many ranks will take, on this machine and without its weights."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import torch
import typer

import distpatch
from distpatch.cli import files
from distpatch.cli import options as o
from distpatch.cli.session import WRONG_INPUT, parse_shape


def plan(
    model: o.Folder,
    shape: o.ShapeOption = "1,4,64,64",
    world_size: Annotated[int, typer.Option(min=1, help="Ranks to plan for.")] = 8,
    method: Annotated[Literal["decode", "encode", "forward"], typer.Option(help="What is called.")] = "decode",
    dtype: o.DtypeOption = "float32",
    as_json: o.JsonOption = False,
) -> None:
    """Memory, bytes and messages of a run on N ranks, from fake tensors: no GPU, and no weights are read.

    Examples:

        distpatch plan vae/ --shape 1,4,1024,1024 --world-size 8

        distpatch plan wan/ --shape 1,16,21,90,160 --world-size 4 --json
    """
    make: Any = getattr(distpatch, "plan", None)
    if make is None:
        typer.echo(f"error: distpatch {distpatch.__version__} has no plan", err=True)
        raise typer.Exit(WRONG_INPUT)
    found, where = files.model_class(model)
    precision = getattr(torch, dtype)
    built = found.from_config(found.load_config(where)).eval().requires_grad_(False).to(precision)
    planned = make(built, torch.zeros(parse_shape(shape), dtype=precision), world_size=world_size, method=method)
    if as_json:
        numbers = planned.to_json()
        typer.echo(numbers if isinstance(numbers, str) else json.dumps(numbers, indent=1))
    else:
        typer.echo(planned.table())
