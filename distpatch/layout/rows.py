"""Who owns which rows: frozen data, no communication."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

from distpatch.errors import LayoutError
from distpatch.layout.stencil import Interval

Bounds = tuple[int, ...]
Needs = tuple[tuple[Interval, ...], ...]  # needs[rank]: the row intervals that rank asks for

EMPTY: Interval = (0, 0)
PRIME = (1 << 61) - 1  # larger than any size
MANY = PRIME * 720720  # what a size of 0 is counted as: has the sizes that dims are usually split in as factors


class Stencil(Protocol):
    """What a rule has to know of an operation along the sharded dim (stencil.py)."""

    def out_rows(self, rows_in: int) -> int: ...
    def need(self, lo: int, hi: int) -> Interval: ...
    def first_out(self, row: int) -> int: ...
    def __hash__(self) -> int: ...  # plans are cached by it


def is_tiny(bounds: Bounds) -> bool:
    return any(b - a < 2 for a, b in pairwise(bounds))


@dataclass(frozen=True)
class RowLayout:
    """Rank r owns the global rows ``bounds[r]:bounds[r + 1]`` of dimension ``dim`` (>= 0), ``size`` in all.

    ``is_tiny``: a rank has one row or none, whose strides do not tell in which order dims stand in memory.
    """

    dim: int
    bounds: Bounds
    size: int = field(init=False, repr=False, compare=False)
    is_tiny: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.bounds[-1] if self.bounds else 0)
        object.__setattr__(self, "is_tiny", is_tiny(self.bounds))
        ordered = all(a <= b for a, b in pairwise(self.bounds))
        if len(self.bounds) < 2 or self.bounds[0] != 0 or not ordered:
            raise LayoutError(
                f"bounds must begin with 0, never fall and have one entry more than there are ranks; got {self.bounds}"
            )

    @property
    def world_size(self) -> int:
        return len(self.bounds) - 1

    @property
    def heights(self) -> tuple[int, ...]:
        """How many rows each rank owns."""
        return tuple(hi - lo for lo, hi in pairwise(self.bounds))

    @property
    def parts(self) -> tuple[Part, ...]:
        """What its rows are made of, as of a ``BlockLayout`` (blocks.py): one part of one block."""
        return (Part(self.bounds),)

    def interval(self, rank: int) -> Interval:
        return self.bounds[rank], self.bounds[rank + 1]

    def height(self, rank: int) -> int:
        """How many rows a rank owns."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def rows_before(self, row: int, rank: int) -> int:
        """How many of a rank's rows come before a row of the whole."""
        return min(max(row - self.bounds[rank], 0), self.height(rank))

    def intervals(self, rank: int) -> Iterator[Interval]:
        """The global rows that a rank holds, in its order."""
        lo, hi = self.interval(rank)
        if lo < hi:
            yield lo, hi

    def cuts(self, lo: int, hi: int) -> list[Cut]:
        """What rows [lo, hi) of the whole are made of; each rank keeps those of its own."""
        return [Cut(0, Part(clipped(self.bounds, lo, hi)), (0, 1, 1))]

    def with_dim(self, dim: int) -> RowLayout:
        return self if dim == self.dim else _layout(dim, self.bounds)

    def with_bounds(self, bounds: Bounds) -> RowLayout:
        return self if bounds == self.bounds else _layout(self.dim, bounds)


class Part(NamedTuple):
    """Some of the rows: of each block of them, rank r owns the rows ``inner[r]:inner[r + 1]``.

    ``blocks``: the sizes of the dims that were merged in front of the rows; there are as many as their product.
    """

    inner: Bounds
    blocks: tuple[int, ...] = ()

    @property
    def block_count(self) -> int:
        """How many blocks there are."""
        return math.prod(self.blocks)

    @property
    def void(self) -> bool:
        """Whether there are none, since they were merged with a dim behind them that has no elements.

        ``inner`` counts them as if it had ``MANY``: so it is known who has which when that dim is split off again.
        """
        return self.inner[-1] > 0 and self.inner[-1] % PRIME == 0

    @property
    def size(self) -> int:
        return 0 if self.void else self.block_count * self.inner[-1]

    def height(self, rank: int) -> int:
        """How many of them a rank owns."""
        return 0 if self.void else self.block_count * (self.inner[rank + 1] - self.inner[rank])


class Cut(NamedTuple):
    """Some rows of one part of a layout: of which, and how they are shared out.

    ``share``: from which of its blocks to which they are, and of how many.
    """

    part: int
    rows: Part
    share: tuple[int, int, int]


def clipped(bounds: Bounds, lo: int, hi: int) -> Bounds:
    """The bounds of rows [lo, hi), counted from the first of these."""
    return tuple(min(max(b, lo), hi) - lo for b in bounds)


@lru_cache(maxsize=4096)
def _layout(dim: int, bounds: Bounds) -> RowLayout:
    return RowLayout(dim, bounds)


@lru_cache(maxsize=4096)
def even_bounds(rows: int, world_size: int) -> Bounds:
    """Bounds that differ by at most one row; the first ranks take the longer shards."""
    share, extra = divmod(rows, world_size)
    return tuple(rank * share + min(rank, extra) for rank in range(world_size + 1))


@lru_cache(maxsize=4096)
def aligned_bounds(bounds: Bounds, unit: int) -> Bounds:
    """The bounds, each moved to the nearest multiple of ``unit`` rows; the last stays."""
    last = bounds[-1] - bounds[-1] % unit
    return (*(min((b + unit // 2) // unit * unit, last) for b in bounds[:-1]), bounds[-1])
