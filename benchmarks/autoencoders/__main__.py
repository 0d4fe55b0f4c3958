"""Every autoencoder of diffusers, converted, against one device: the table of docs/models.md.

    python -m benchmarks.autoencoders --worlds 2 3 4

Small configs with random weights; all heights that diffusers accepts of even, odd and
fractional multiples, the smallest included; ranks are threads over gloo. ``fallback="error"``: an operation
that would have to be gathered fails the call.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from diffusers.utils import logging
from rich.progress import track

from tests.support.zoo.autoencoder_runs import accepted_heights, compare
from tests.support.zoo.autoencoders import AUTOENCODERS

# DistVAE 0.1.0 has an adapter for these; of what was seen to fail, in brackets.
PEER = {
    "AutoencoderKL": "yes",
    "AutoencoderKLFlux2": "yes",
    "AutoencoderKLWan": "yes",
    "AutoencoderKLQwenImage": "yes",
    "AutoencoderKLHunyuanVideo": "yes",
    "AutoencoderKLHunyuanVideo15": "yes (encode of 144 rows crashes)",
    "AutoencoderKLLTX2Video": "yes (encode of 64 rows on 3 ranks hangs)",
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Cell:
    """One call of one autoencoder, over all heights and worlds."""

    heights: tuple[int, ...]
    error: float = 0.0
    fallbacks: int = 0
    failure: str = ""

    @property
    def rows(self) -> str:
        return " ".join(map(str, sorted(self.heights)))


def measure(name: str, call: str, worlds: list[int], dtype: torch.dtype | None) -> Cell:
    cell = Cell(accepted_heights(name, call))
    for world in worlds:
        try:
            result = compare(name, [(call, rows) for rows in cell.heights], world, dtype, timeout=120)
        except Exception as error:
            cell.failure = f"{type(error).__name__} on {world} ranks: {error}".replace("\n", " ")[:300]
            return cell
        cell.error = max(cell.error, result.error)
        cell.fallbacks += result.fallbacks
    return cell


@app.command()
def main(
    worlds: Annotated[list[int], typer.Option(help="numbers of ranks")] = [2, 3, 4],  # noqa: B006
    single: Annotated[bool, typer.Option(help="in fp32; else in fp64, where a model can")] = False,
    only: Annotated[str, typer.Option(help="autoencoders whose name contains this")] = "",
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    dtype = torch.float32 if single else None
    print("| autoencoder | rows encoded | rows decoded | largest error | fallbacks | DistVAE 0.1.0 |")
    print("|---|---|---|---|---|---|")
    for name, entry in track(AUTOENCODERS.items(), transient=True):
        if only in name:
            cells = {call: measure(name, call, worlds, dtype) for call in entry.calls}
            rows = [cells[call].rows if call in cells else "-" for call in ("encode", "decode")]
            failures = [f"{call}: {cell.failure}" for call, cell in cells.items() if cell.failure]
            error = "; ".join(failures) or f"{max(cell.error for cell in cells.values()):.0e}"
            fallbacks = sum(cell.fallbacks for cell in cells.values())
            print("|", " | ".join([name, *rows, error, str(fallbacks), PEER.get(entry.cls, "no")]), "|", flush=True)
    print(
        f"\nEncode, decode and forward; the largest error of any rank on {', '.join(map(str, worlds))} ranks over the "
        "largest value of the result."
    )


if __name__ == "__main__":
    app()
