"""Which command makes which figures of the documents.

A section's output stands in a page between ``<!-- figures: NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Section:
    """``commands`` run one after the other; what the last ``shown`` of them print goes into the page.

    ``timed``: it measures time or memory, so nothing else runs beside it. ``fenced``: its output is text, no Markdown.
    ``pictures``: what it draws elsewhere, and the name in ``docs`` to which that is copied.
    """

    name: str
    commands: tuple[str, ...]
    timed: bool = True
    fenced: bool = False
    shown: int = 1
    pictures: tuple[tuple[str, str], ...] = ()


def timed(name: str, *commands: str) -> Section:
    return Section(name=name, commands=commands)


def untimed(name: str, *commands: str) -> Section:
    return Section(name=name, commands=commands, timed=False)


OUT = "out/figures"
TWO_RANKS = "torchrun --standalone --nproc_per_node=2"
SEGMENTATION = "torchrun_examples/train_segmentation.py"
SECTIONS = (
    # Seconds and bytes of this machine, one after the other.
    timed("decode", "python -m benchmarks.decode --size 256 --rounds 3 --patch-conv"),
    timed("conv", "python -m benchmarks.memory --case conv --conv-size 1024 --only 'splits 16' --only lazy"),
    timed("overhead", "python -m benchmarks.overhead"),
    timed(
        "peers",
        "python -m benchmarks.peers --install",
        "python -m benchmarks.peers --size 256 --rounds 3 --plot docs/peers.png",
    ),
    timed("breadth", "python -m benchmarks.breadth --rounds 3 --plot docs/breadth.png"),
    timed("small", "python -m benchmarks.small --rounds 20"),
    timed("unequal", "python -m benchmarks.unequal --rounds 5"),
    timed("host", "python -m benchmarks.host"),
    timed("no-links", "python -m benchmarks.host --no-links --compiled --by-rule --rounds 30"),
    Section(
        name="messages", commands=("python -m benchmarks.messages", "python -m benchmarks.messages --ranks 4"), shown=2
    ),
    timed("latency", "python -m benchmarks.latency --size 256 --rounds 7"),
    timed("scaling", "python -m benchmarks.scaling --size 256 --plot docs/scaling.png"),
    timed("displaced-hidden", f"{TWO_RANKS} -m benchmarks.displaced hidden --delay-ms 5"),
    timed("displaced-transformer-hidden", f"{TWO_RANKS} -m benchmarks.displaced hidden --model transformer --rounds 3"),
    timed("failures", "python -m benchmarks.failures"),
    timed("handshake", "python -m benchmarks.failures --handshake"),
    Section(
        name="demo",
        commands=(f"{TWO_RANKS} torchrun_examples/decode_vae.py --out {OUT}",),
        fenced=True,
        pictures=((f"{OUT}/decode_vae_2_ranks.png", "demo.png"),),
    ),
    # Values, counts and plans, which are the same on a busy machine.
    untimed(
        "displaced",
        "python -m benchmarks.displaced.train_denoiser",
        f"{TWO_RANKS} -m benchmarks.displaced quality",
    ),
    untimed(
        "displaced-transformer",
        "python -m benchmarks.displaced.train_denoiser --model transformer --seconds 150",
        f"{TWO_RANKS} -m benchmarks.displaced quality --model transformer --side 128 --pictures 8",
    ),
    untimed("pipelines", "python -m benchmarks.pipelines"),
    untimed("autoencoders", "python -m benchmarks.autoencoders"),
    untimed("transformers", "python -m benchmarks.transformers"),
    untimed("attention", "python -m benchmarks.transformers.attention"),
    untimed("meshes", "python -m benchmarks.planned meshes"),
    untimed("launches", "python -m benchmarks.planned launches"),
    untimed("kit", "python -m benchmarks.gpu --device cpu"),
    Section(
        name="plan",
        commands=("distpatch plan --shape 1,4,1024,1024 --world-size 8",),
        timed=False,
        fenced=True,
    ),
    Section(
        name="training",
        commands=(
            f"python {SEGMENTATION} --out {OUT}/one",
            f"torchrun --standalone --nproc_per_node=4 {SEGMENTATION} --out {OUT}/first --steps 20",
            f"{TWO_RANKS} {SEGMENTATION} --out {OUT}/second --resume {OUT}/first --beside {OUT}/one",
        ),
        timed=False,
        fenced=True,
        shown=3,
        pictures=((f"{OUT}/second/losses.png", "training.png"),),
    ),
    Section(name="volume", commands=(f"{TWO_RANKS} torchrun_examples/segment_volume.py",), timed=False, fenced=True),
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


def figures_on(text: str, name: str) -> str:
    """What stands between the two marks of a section."""
    _, _, rest = text.partition(BEGIN.format(name))
    inside, found, _ = rest.partition(END.format(name))
    if not found:
        raise ValueError(f"{BEGIN.format(name)} is not followed by {END.format(name)}")
    return inside


def put(text: str, name: str, body: str) -> str:
    """The page with other figures between the two marks of a section."""
    begin, end = BEGIN.format(name), END.format(name)
    return text.replace(f"{begin}{figures_on(text, name)}{end}", f"{begin}\n{body.strip()}\n{end}")
