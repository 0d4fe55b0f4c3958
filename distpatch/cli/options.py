"""Options that several sub-commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from distpatch.cli.session import Device, Dtype

Folder: TypeAlias = Annotated[
    Path, typer.Argument(help="Folder of a diffusers model (save_pretrained), or of a pipeline with a vae folder.")
]
DtypeOption: TypeAlias = Annotated[Dtype, typer.Option(help="Of weights and activations.")]
DeviceOption: TypeAlias = Annotated[
    Device | None, typer.Option(help="GPUs where there are any, else the CPU, if not given.", show_default=False)
]
ThreadsOption: TypeAlias = Annotated[int | None, typer.Option(min=1, help="CPU threads of a rank.", show_default=False)]
TimeoutOption: TypeAlias = Annotated[
    float | None,
    typer.Option(
        min=1, help="Seconds that a rank waits for another; torch's default if not given.", show_default=False
    ),
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
CheckOption: TypeAlias = Annotated[
    bool, typer.Option("--check", help="Run on rank 0 alone too, and print the largest difference.")
]
KeyOption: TypeAlias = Annotated[
    str | None, typer.Option(help="Which tensor of a file that has several.", show_default=False)
]
ShapeOption: TypeAlias = Annotated[
    str, typer.Option(help="Of the tensor that the method gets: batch, channels, (frames,) rows, columns.")
]
