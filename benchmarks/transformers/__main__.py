"""Every diffusion transformer of diffusers, converted, against one device: the table of docs/transformers.md.

    python -m benchmarks.transformers --worlds 2 3

Small configs with random weights, an odd number of rows or tokens; ranks are threads over gloo. Forward, and backward
where torch has the gradients on a CPU.
"""

from __future__ import annotations

import warnings
from typing import Annotated

import torch
import typer
from diffusers.utils import logging
from rich.progress import track

from tests.support.zoo.transformers_of_diffusers import TRANSFORMERS, Comparison, compare

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(name: str, worlds: list[int]) -> Comparison | str:
    """Over all worlds, forward and backward; in words what failed."""
    largest = Comparison()
    for world in worlds:
        for backward in (False, True)[: 1 + TRANSFORMERS[name].backward]:
            try:
                result = compare(name, world, backward=backward, timeout=120)
            except Exception as error:
                return f"{type(error).__name__} on {world} ranks: {error}".replace("\n", " ")[:300]
            largest.error = max(largest.error, result.error)
            largest.gradient = max(largest.gradient, result.gradient)
            largest.gathered.update(result.gathered)
    return largest


@app.command()
def main(
    worlds: Annotated[list[int], typer.Option(help="numbers of ranks")] = [2, 3],  # noqa: B006
    only: Annotated[str, typer.Option(help="transformers whose name contains this")] = "",
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    print("| transformer | sharded | dtype | largest error | of gradients | gathered |")
    print("|---|---|---|---|---|---|")
    for name, entry in track(TRANSFORMERS.items(), transient=True):
        if only in name:
            result = measure(name, worlds)
            if isinstance(result, Comparison):
                gradient = f"{result.gradient:.0e}" if entry.backward else "torch has none on a CPU"
                gathered = ", ".join(f"{op}: {count}" for op, count in result.gathered.items()) or "0"
                cells = [f"{result.error:.0e}", gradient, gathered]
            else:
                cells = [result, "", ""]
            dtype = str(entry.dtype).removeprefix("torch.float")
            print("|", " | ".join([name, entry.entering, f"fp{dtype}", *cells]), "|", flush=True)
    print(f"\nThe largest error of any rank on {' and '.join(map(str, worlds))} ranks over the largest value.")


if __name__ == "__main__":
    app()
