"""Rows of which a rank does not hold one piece: in blocks, since dims were merged, or of several tensors joined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from distpatch.layout.rows import PRIME, Bounds, Cut, Part, RowLayout, clipped, is_tiny
from distpatch.layout.stencil import Interval


class InnerCut(NamedTuple):
    """What a ``Cut`` takes of one rank's rows: of which part, which share of it, and how many rows that is."""

    part: int
    share: tuple[int, int, int]
    height: int


class BlockLayout(RowLayout):
    """Parts of rows one after the other, of each of which a rank has some.

    A dim merged in front of the rows makes blocks of them: one part of several blocks. Tensors that are joined along
    the rows, which stay where they are, are a part each. A rank holds its rows part by part, and block by block. A rule
    that treats all rows alike needs no more than ``dim``, ``size`` and ``heights``; there are no ``bounds``. Made by
    ``layout_of``.
    """

    _parts: tuple[Part, ...]

    def __init__(self, dim: int, parts: Sequence[Part]) -> None:
        known = {"dim": dim, "_parts": tuple(parts), "size": sum(part.size for part in parts)}
        for name, value in known.items():
            object.__setattr__(self, name, value)
        first = parts[0].inner if len(parts) == 1 else tuple(self.held)
        object.__setattr__(self, "is_tiny", is_tiny(first))

    @property
    def parts(self) -> tuple[Part, ...]:
        return self._parts

    @property
    def bounds(self) -> Bounds:  # type: ignore[override]
        raise AssertionError(f"the rows of {self} are not in order: its rule must not be marked any_order")

    @property
    def world_size(self) -> int:
        return len(self.parts[0].inner) - 1

    @property
    def heights(self) -> tuple[int, ...]:
        return tuple(map(self.height, range(self.world_size)))

    @property
    def held(self) -> Bounds:
        """Where each rank's rows begin if those of one rank come after the other's."""
        return tuple(accumulate(self.heights, initial=0))

    @property
    def is_joined(self) -> bool:
        """Whether there are several parts."""
        return len(self.parts) > 1

    @property
    def pieces(self) -> list[RowLayout]:
        """The layouts of its parts."""
        return [layout_of(self.dim, [part]) for part in self.parts]

    @property
    def opened(self) -> RowLayout:
        """The layout of its one part where blocks and rows are two dims again."""
        return layout_of(self.dim + 1, [self.parts[0]._replace(blocks=())])

    @property
    def blocks(self) -> int:
        """Of its one part."""
        (part,) = self.parts
        return part.block_count

    def intervals(self, rank: int) -> Iterator[Interval]:
        first = 0
        for part in self.parts:
            rows, lo, hi = part.inner[-1], part.inner[rank], part.inner[rank + 1]
            if lo < hi and not part.void:
                yield from ((first + block * rows + lo, first + block * rows + hi) for block in range(part.block_count))
            first += part.size

    def height(self, rank: int) -> int:
        return sum(part.height(rank) for part in self.parts)

    def rows_before(self, row: int, rank: int) -> int:
        return sum(cut.rows.height(rank) for cut in self.cuts(0, row))

    def cuts(self, lo: int, hi: int) -> list[Cut]:
        cuts, first = [], 0
        for at, part in enumerate(self.parts):
            cuts += [Cut(at, *some) for some in _cropped(part, max(lo - first, 0), min(hi - first, part.size))]
            first += part.size
        return cuts or [Cut(0, _none_of(self), (0, 0, 1))]

    def with_dim(self, dim: int) -> RowLayout:
        return self if dim == self.dim else _layout(dim, self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockLayout) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"BlockLayout(dim={self.dim}, parts={[(part.inner, part.blocks) for part in self.parts]})"

    @property
    def _key(self) -> Any:
        return self.dim, tuple((part.inner, part.block_count) for part in self.parts)


def cut_inside(layout: RowLayout, start: int, cuts: Sequence[InnerCut]) -> list[list[Part]]:
    """What each cut takes of one rank's rows of an outer axis, which are in this layout themselves, from ``start``.

    The layout has a part for each of the outer one's. What there is none of on this rank is taken as it is on others.
    """
    taken = []
    firsts = list(accumulate((part.size for part in layout.parts), initial=0))
    apart = any(part.void for part in layout.parts)
    for at, (lo, hi, of), count in cuts:
        part = layout.parts[at] if at < len(layout.parts) else _none_of(layout)
        first = start - firsts[min(at, len(layout.parts))]
        some: Iterable[Part] = ()
        if part.void:
            counted = part.block_count * part.inner[-1] // PRIME
            some = (rows for rows, _ in _cropped(part, counted * lo // of * PRIME, counted * hi // of * PRIME))
        elif apart and 0 <= first < first + count <= part.size:
            some = (rows for rows, _ in _cropped(part, first, first + count))
        elif count:
            some = (cut.rows for cut in layout.cuts(start, start + count))
        taken.append([*some] or [_none_of(layout)])
        start += count
    return taken


def _none_of(layout: RowLayout) -> Part:
    return Part((0,) * (layout.world_size + 1))


@lru_cache(maxsize=4096)
def _layout(dim: int, parts: tuple[Part, ...]) -> RowLayout:
    if len(parts) == 1 and parts[0].block_count == 1 and not parts[0].void:
        return RowLayout(dim, parts[0].inner)
    return BlockLayout(dim, parts)


def layout_of(dim: int, parts: Iterable[Part]) -> RowLayout:
    """The layout of rows that are these parts, one after the other; in order where one of one block is all."""
    return _layout(dim, tuple(parts))


def _cropped(part: Part, lo: int, hi: int) -> Iterator[tuple[Part, tuple[int, int, int]]]:
    """Rows [lo, hi) of a part: the rest of a block, whole blocks, the begin of one; and which blocks these are.

    Each is of one element of every dim in front of the last one cut: so it is one part on an inner axis, too, whose
    rows are one of these dims.
    """
    if lo >= hi:
        return
    rows, blocks = part.inner[-1], part.block_count
    (block, start), (last, stop) = divmod(lo, rows), divmod(hi, rows)
    if block == last:
        yield Part(clipped(part.inner, start, stop)), (block, block + 1, blocks)
        return
    if start:
        yield Part(clipped(part.inner, start, rows)), (block, block + 1, blocks)
        block += 1
    for first, end, sizes in _whole_blocks(part.blocks, block, last):
        yield part._replace(blocks=sizes), (first, end, blocks)
    if stop:
        yield Part(clipped(part.inner, 0, stop)), (last, last + 1, blocks)


def _whole_blocks(sizes: tuple[int, ...], lo: int, hi: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Blocks [lo, hi), of as many as these sizes multiply up to: (first, end, sizes), each a box of the dims."""
    if lo >= hi:
        return
    if len(sizes) < 2:
        yield lo, hi, (hi - lo,) if hi > lo + 1 else ()
        return
    each = math.prod(sizes[1:])
    (at, start), (last, stop) = divmod(lo, each), divmod(hi, each)

    def within(at: int, start: int, stop: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        return ((at * each + a, at * each + b, own) for a, b, own in _whole_blocks(sizes[1:], start, stop))

    if at == last:
        yield from within(at, start, stop)
        return
    if start:
        yield from within(at, start, each)
        at += 1
    if at < last:
        yield at * each, last * each, (last - at, *sizes[1:])
    yield from within(last, 0, stop)
