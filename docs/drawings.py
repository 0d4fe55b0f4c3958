"""Draws docs/drawings/*.svg: python docs/drawings.py (make drawings). Plain SVG, no library."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent / "drawings"
RANKS = ("#2a9d8f", "#e9c46a", "#e76f51")
INK, PALE, GRID = "#22303c", "#eef2f4", "#ffffff"
STYLE = "font-family: system-ui, 'DejaVu Sans', sans-serif; font-size: 14px"


class Drawing:
    """Shapes with sizes in pixels, on white."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, *, dashed: bool = False) -> None:
        """A rectangle; a dashed one stands for what does not exist in memory, or is someone else's."""
        line = f'stroke="{INK}" stroke-dasharray="4 3"' if dashed else f'stroke="{GRID}"'
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="{fill}" {line}/>')

    def rows(self, x: float, y: float, width: float, colours: list[str], height: float = 18) -> None:
        """Rows of a tensor below each other, one colour each."""
        for row, colour in enumerate(colours):
            self.box(x, y + row * height, width, height, colour)

    def text(
        self, x: float, y: float, text: str, *, at: str = "middle", bold: bool = False, small: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        size = ' font-size="12"' if small else ""
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{at}" fill="{INK}"{weight}{size}>{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """From the first point to the last, by the others."""
        path = " L ".join(f"{x} {y}" for x, y in points)
        self.parts.append(f'<path d="M {path}" fill="none" stroke="{INK}" stroke-width="1.6" marker-end="url(#head)"/>')

    def save(self, name: str) -> None:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" style="{STYLE}">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" fill="white"/>\n'
        )
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / name).write_text(head + "\n".join(self.parts) + "\n</svg>\n", encoding="utf-8")


def shard() -> None:
    """One tensor of 11 rows, and what each of three ranks has of it."""
    d = Drawing(760, 290, "A tensor of 11 rows on three ranks")
    heights = (4, 4, 3)
    d.text(100, 24, "x, as the model sees it", bold=True)
    d.rows(30, 40, 140, [colour for colour, count in zip(RANKS, heights) for _ in range(count)])
    d.text(100, 262, "x.shape = (1, C, 11, W)", small=True)
    for rank, count in enumerate(heights):
        left = 300 + rank * 155
        d.text(left + 60, 24, f"rank {rank}", bold=True)
        d.rows(left, 40, 120, [RANKS[rank]] * count)
        d.text(left + 60, 40 + count * 18 + 18, f"x.local: {count} rows", small=True)
        d.rows(left, 150, 120, ["#8d99ae"] * 3)
        d.text(left + 60, 150 + 54 + 18, "weights: all of them", small=True)
    d.arrow((180, 140), (285, 140))
    d.text(232, 130, "shard", small=True)
    d.text(510, 262, "sharded: rows of the activations  ·  replicated: weights and other plain tensors", small=True)
    d.save("shard.svg")


def halo() -> None:
    """A convolution of three rows: what rank 1 is sent, and when."""
    d = Drawing(760, 330, "Halo rows of a 3 by 3 convolution on rank 1 of 3")
    colours = [RANKS[rank] for rank in (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2)]
    d.text(120, 24, "input rows", bold=True)
    d.rows(60, 40, 120, colours, 22)
    for rank, y in enumerate((84, 172, 249)):
        d.text(52, y + 5, f"rank {rank}", at="end", small=True)
    left, top = 300, 40 + 3 * 22
    d.text(left + 60, 24, "what rank 1 reads", bold=True)
    d.box(left, top, 120, 22, RANKS[0], dashed=True)
    d.rows(left, top + 22, 120, [RANKS[1]] * 4, 22)
    d.box(left, top + 110, 120, 22, RANKS[2], dashed=True)
    d.arrow((184, top + 11), (left - 4, top + 11))
    d.arrow((184, top + 121), (left - 4, top + 121))
    d.text(240, top + 5, "one message", small=True)
    d.text(240, top + 115, "one message", small=True)
    right = 560
    d.text(right + 60, 24, "what it computes", bold=True)
    d.rows(right, top + 22, 120, [RANKS[1]] * 4, 22)
    for row, when in enumerate(("last", "first", "first", "last")):
        d.text(right + 130, top + 38 + row * 22, when, at="start", small=True)
    d.arrow((left + 124, top + 66), (right - 4, top + 66))
    d.text((left + 120 + right) / 2, top + 56, "conv2d", small=True)
    d.text(
        380,
        305,
        "Rows that need no halo are computed while the halo is under way; then the rank waits, then the others.",
        small=True,
    )
    d.save("halo.svg")


def lazy() -> None:
    """Norm, activation and convolution: at once, and patch by patch."""
    d = Drawing(760, 370, "Norm, activation and convolution at once and deferred")
    names = ("x", "group_norm", "silu", "conv2d")
    for line, (title, top) in enumerate(
        [("At once: every step is a whole tensor", 24), ("Deferred: a patch at a time", 196)]
    ):
        d.text(20, top, title, at="start", bold=True)
        for step, name in enumerate(names):
            left = 40 + step * 185
            exists = line == 0 or step in {0, 3}
            if exists:
                d.rows(left, top + 14, 110, [RANKS[0]] * 8, 14)
            else:
                d.box(left, top + 14, 110, 112, "white", dashed=True)
                d.rows(left, top + 14 + 28, 110, [RANKS[1]] * 3, 14)
            if line == 1 and step == 3:
                d.rows(left, top + 14 + 42, 110, [RANKS[1]], 14)
                d.rows(left, top + 14 + 56, 110, [PALE] * 4, 14)
                d.box(left, top + 14 + 56, 110, 56, "none", dashed=True)
            if line == 1 and step == 0:
                d.rows(left, top + 14 + 28, 110, [RANKS[1]] * 3, 14)
            d.text(left + 55, top + 144, name, small=True)
            if step:
                d.arrow((left - 70, top + 70), (left - 5, top + 70))
    d.text(380, 360, "Yellow: the rows in work.  Dashed: never in memory as a whole, or not yet written.", small=True)
    d.save("lazy.svg")


def folders() -> None:
    """Which folder calls which, in one call of a model."""
    d = Drawing(810, 470, "A call, from the model to plain torch and back")
    boxes = {
        "model": (230, 60, "compare the call with the other ranks',", "shard the arguments, gather the result"),
        "tensor": (230, 150, "a torch function is called:", "which rule?"),
        "rules": (230, 240, "the sharded meaning", "of this function"),
        "layout": (20, 340, "who owns which rows, and", "which are read: integers"),
        "comm": (290, 340, "rows of other ranks:", "messages, collectives"),
        "lazy": (560, 340, "what may be computed", "later, in patches"),
    }
    for name, (x, y, *lines) in boxes.items():
        width = 330 if y < 300 else 220
        d.box(x, y, width, 62, PALE)
        d.text(x + width / 2, y + 20, name, bold=True)
        for place, line in enumerate(lines):
            d.text(x + width / 2, y + 37 + 16 * place, line, small=True)
    d.text(395, 24, "model(x), on every rank")
    for y in (30, 122, 212):
        d.arrow((395, y), (395, y + 28))
    for x in (130, 400, 670):
        d.arrow((395, 302), (x, 338))
    d.text(400, 450, "plain torch on this rank's rows")
    for x in (400, 670):
        d.arrow((x, 404), (400 + (x - 400) / 6, 434))
    d.text(680, 84, "profiling: bytes, messages, FLOPs", small=True)
    d.text(680, 104, "planning: the same run, without data", small=True)
    d.text(680, 124, "diffusion: last step's rows", small=True)
    d.arrow((520, 445), (795, 445), (795, 181), (562, 181))
    d.text(680, 174, "PatchTensor", small=True)
    d.save("folders.svg")


def main() -> None:
    folders()
    shard()
    halo()
    lazy()


if __name__ == "__main__":
    main()
