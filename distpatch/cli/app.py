"""The sub-commands under their names."""

from __future__ import annotations

from typing import Annotated

import typer

import distpatch
from distpatch.cli.bench import bench
from distpatch.cli.decode import decode
from distpatch.cli.doctor import doctor
from distpatch.cli.encode import encode
from distpatch.cli.plan import plan
from distpatch.cli.segment import segment
from distpatch.cli.upscale import upscale

HELP = """Run convolutional models on all GPUs of a torch.distributed group, with the values of one.

`distpatch COMMAND` runs in this process alone; on several GPUs, torchrun starts a process for each:

    torchrun --nproc_per_node=8 -m distpatch COMMAND ...

Exit codes: 0 done, 1 failed, 2 a wrong option or file, 3 doctor found a fault.
"""

app = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
for command in (plan, decode, encode, upscale, segment, bench, doctor):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(distpatch.__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What all sub-commands share."""
