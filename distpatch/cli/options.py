"""Options that several sub-commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from distpatch.cli.session import Device, Dtype

Folder: TypeAlias = Annotated[
    Path,
    typer.Argument(
        help="Folder of a diffusers model (save_pretrained), or of a pipeline with a vae folder; or its id on the hub."
    ),
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
NetArgument: TypeAlias = Annotated[
    Path,
    typer.Argument(
        help="Folder of a transformers model, its id on the hub, or a program: .pt2 (torch.export.save), .pt or .ts "
        "(TorchScript). A program is code that runs: take none of strangers."
    ),
]
SourcesHelp = "Files, folders, or a list of paths, one a line (.txt)"
SuffixOption: TypeAlias = Annotated[
    str | None, typer.Option(help="Of outputs in a folder, such as .npy.", show_default=False)
]
RowsOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Ranks that share the rows of an input: of 8 with --rows 2 four inputs at a time. All if not given.",
        show_default=False,
    ),
]
ResumeOption: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="Leave out inputs whose output exists: it has its name when it is complete.")
]
DryRunOption: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done, and the memory that it takes; no weights are read.")
]
SizeOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="512, or rows x columns such as 512x768: pictures are scaled to cover it, and cut to it.",
        show_default=False,
    ),
]
