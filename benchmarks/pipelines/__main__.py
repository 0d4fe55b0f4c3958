"""Whole pipelines of diffusers by ``parallelize_pipeline`` against one device: the table of docs/pipelines.md.

    python -m benchmarks.pipelines --worlds 2 3

Small configs with random weights, two steps, prompts as embeddings; ranks are threads over gloo.
"""

from __future__ import annotations

import warnings
from typing import Annotated

import torch
import typer
from diffusers.utils import logging
from rich.progress import track

from tests.support.zoo.pipeline_runs import ALL_PIPELINES, Comparison, compare

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def row(name: str, found: dict[int, Comparison]) -> str:
    results = found.values()
    run = ALL_PIPELINES[name]
    cells = [
        name,
        ", ".join(sorted(run.converted, key="vae".__eq__)),
        f"{max(result.error for result in results):.0e}",
        "same" if all(result.same_bits for result in results) else "DIFFERENT",
        ", ".join(sorted({op for result in results for op in result.fallbacks})) or "0",
        " / ".join(f"{result.sent_bytes:,}" for result in results),
        " / ".join(f"{(world - 1) * result.latent_bytes:,}" for world, result in found.items()),
    ]
    return "| " + " | ".join(cells) + " |"


@app.command()
def main(
    worlds: Annotated[list[int], typer.Option(help="numbers of ranks")] = [2, 3],  # noqa: B006
    only: Annotated[str, typer.Option(help="pipelines whose name contains this")] = "",
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    print("| pipeline | on all ranks | largest error | bits of ranks | gathered | re-sliced, bytes | a gather, bytes |")
    print("|---|---|---|---|---|---|---|")
    for name in track(ALL_PIPELINES, transient=True):
        if only in name:
            print(row(name, compare(name, worlds, timeout=120, fallback="allow")), flush=True)
    print(f"\nOn {' / '.join(map(str, worlds))} ranks. Bytes are those of all ranks together, between the last step's")
    print("denoiser and the decoder's first operation; beside them, what gathering the latents there would send.")


if __name__ == "__main__":
    app()
