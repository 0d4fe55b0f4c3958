"""Peak memory over activation size, a line a contestant: what ``--plot`` draws.

python -m benchmarks.memory.plot memory.json docs/memory.png    # again, from the numbers
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from benchmarks._harness.plots import drawing

MIB = 1 << 20
TITLES = {
    "conv": ("One 3 x 3 convolution, 128 channels", "input of the convolution, MiB"),
    "decode": ("Decode, Stable Diffusion's decoder", "largest activation, MiB"),
}
STYLES = {"plain": "k-o", "patch_conv": "--s", "tiling": ":x", "DistVAE": ":D", "distpatch": "-o"}


def draw(results: Iterable[Any], path: Path) -> None:
    """One panel a case: the resident peak over what was there before, of the rank with the most."""
    results = [result for result in results if not result.failure]
    cases = list(dict.fromkeys(result.case for result in results))
    with drawing(path, 6.5 * len(cases), 5) as figure:
        axes = figure.subplots(1, len(cases), squeeze=False)
        for axis, case in zip(axes[0], cases):
            lines: dict[str, list[Any]] = {}
            for result in results:
                if result.case == case:
                    lines.setdefault(result.contestant.name, []).append(result)
            for name, points in lines.items():
                points.sort(key=lambda point: point.activation_bytes)
                x, y = zip(*((point.activation_bytes / MIB, point.resident_bytes / MIB) for point in points))
                axis.plot(x, y, STYLES[points[0].contestant.kind], label=name, markersize=4, linewidth=1.2)
            title, label = TITLES[case]
            axis.set(title=title, xlabel=label, ylabel="peak memory of one process beyond its input, MiB")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.legend(fontsize=7)


def _read(numbers: dict[str, Any]) -> Any:
    return SimpleNamespace(**{**numbers, "contestant": SimpleNamespace(**numbers["contestant"])})


def main(
    json_file: Annotated[Path, typer.Argument(help="What memory.py --json wrote.")],
    picture: Annotated[Path, typer.Argument(help="A .png or .svg.")],
) -> None:
    draw([_read(numbers) for numbers in json.loads(json_file.read_text())["results"]], picture)


if __name__ == "__main__":
    typer.run(main)
