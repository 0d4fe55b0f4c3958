"""Which command makes which figures of the documents.

A section's output stands in a page between ``<!-- figures: NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """``commands`` run one after the other, and what the last ones print is shown: ``shown`` of them.

    ``timed``: it measures time or memory, so nothing else runs beside it. ``fenced``: its output is text, no Markdown.
    ``plots``: the pictures that it draws, below ``docs``.
    """

    name: str
    commands: tuple[str, ...]
    timed: bool = True
    fenced: bool = False
    shown: int = 1
    plots: tuple[str, ...] = ()


def _section(name: str, *commands: str, **more: object) -> Section:
    return Section(name, commands, **more)  # type: ignore[arg-type]


DISPLACED = "torchrun --standalone --nproc_per_node=2 -m benchmarks.displaced"
SEGMENTATION = "torchrun_examples/train_segmentation.py"
SECTIONS = (
    # Seconds and bytes of this machine, one after the other.
    _section("decode", "python -m benchmarks.decode --size 512 --rounds 3 --patch-conv"),
    _section("conv", "python -m benchmarks.memory --case conv --conv-size 1024 --only 'splits 16' --only lazy"),
    _section("overhead", "python -m benchmarks.overhead"),
    _section(
        "peers",
        "python -m benchmarks.peers --install",
        "python -m benchmarks.peers --size 256 --rounds 3 --plot docs/peers.png",
        plots=("peers.png",),
    ),
    _section("breadth", "python -m benchmarks.breadth --rounds 3 --plot docs/breadth.png", plots=("breadth.png",)),
    _section("small", "python -m benchmarks.small --rounds 20"),
    _section("unequal", "python -m benchmarks.unequal --rounds 5"),
    _section("host", "python -m benchmarks.host"),
    _section("no-links", "python -m benchmarks.host --no-links --compiled --by-rule --rounds 30"),
    _section("latency", "python -m benchmarks.latency --size 256 --rounds 7"),
    _section("scaling", "python -m benchmarks.scaling --plot docs/scaling.png", plots=("scaling.png",)),
    _section("displaced-hidden", f"{DISPLACED} hidden --delay-ms 5"),
    _section("failures", "python -m benchmarks.failures"),
    _section("handshake", "python -m benchmarks.failures --handshake"),
    _section(
        "demo",
        "torchrun --standalone --nproc_per_node=2 torchrun_examples/decode_vae.py --out out/figures",
        fenced=True,
    ),
    # Values, counts and plans, which are the same on a busy machine.
    _section("displaced", "python -m benchmarks.displaced.train_denoiser", f"{DISPLACED} quality", timed=False),
    _section("autoencoders", "python -m benchmarks.autoencoders", timed=False),
    _section("transformers", "python -m benchmarks.transformers", timed=False),
    _section("attention", "python -m benchmarks.transformers.attention", timed=False),
    _section("foreign", "python -m benchmarks.foreign --install", "python -m benchmarks.foreign", timed=False),
    _section("meshes", "python -m benchmarks.planned meshes", timed=False),
    _section("launches", "python -m benchmarks.planned launches", timed=False),
    _section("plan", "distpatch plan --shape 1,4,1024,1024 --world-size 8", timed=False, fenced=True),
    _section(
        "training",
        f"python {SEGMENTATION} --out out/figures/one",
        f"torchrun --standalone --nproc_per_node=4 {SEGMENTATION} --out out/figures/first --steps 20",
        f"torchrun --standalone --nproc_per_node=2 {SEGMENTATION} --out out/figures/second "
        "--resume out/figures/first --beside out/figures/one",
        timed=False,
        fenced=True,
        shown=3,
    ),
    _section(
        "volume",
        "torchrun --standalone --nproc_per_node=2 torchrun_examples/segment_volume.py",
        timed=False,
        fenced=True,
    ),
)


def words(command: str) -> list[str]:
    """What is run, by the interpreter that runs this."""
    first, *rest = shlex.split(command)
    runs = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
        "distpatch": [sys.executable, "-m", "distpatch"],
    }
    return [*runs[first], *rest]


def pages(root: Path) -> dict[str, Path]:
    """The page on which each section stands."""
    found: dict[str, Path] = {}
    for page in sorted([*root.glob("*.md"), *(root / "docs").glob("*.md")]):
        for name in names_on(page.read_text(encoding="utf-8")):
            if name in found:
                raise ValueError(f"figures of {name} stand in {found[name]} and in {page}")
            found[name] = page
    return found


BEGIN, END = "<!-- figures: {} -->", "<!-- end of {} -->"


def names_on(text: str) -> list[str]:
    """The sections that a page has a place for."""
    begin, end = BEGIN.split("{}")
    return [line[len(begin) : -len(end)] for line in text.splitlines() if line.startswith(begin) and line.endswith(end)]


def put(text: str, name: str, body: str) -> str:
    """The page with other figures between the two marks of a section."""
    begin, end = BEGIN.format(name), END.format(name)
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{begin} is not followed by {end}")
    return f"{before}{begin}\n{body.strip()}\n{end}{after}"
