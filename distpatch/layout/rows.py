"""Who owns which rows: frozen data, no communication."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

from distpatch.errors import LayoutError
from distpatch.layout.stencil import Interval

Bounds = tuple[int, ...]
Needs = tuple[tuple[Interval, ...], ...]  # needs[rank]: the row intervals that rank asks for

EMPTY: Interval = (0, 0)


class Stencil(Protocol):
    """What a rule has to know of an operation along the sharded dim (stencil.py)."""

    def out_rows(self, rows_in: int) -> int: ...
    def need(self, lo: int, hi: int) -> Interval: ...
    def first_out(self, row: int) -> int: ...
    def __hash__(self) -> int: ...  # plans are cached by it


def _is_tiny(bounds: Bounds) -> bool:
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
        object.__setattr__(self, "is_tiny", _is_tiny(self.bounds))
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

    def interval(self, rank: int) -> Interval:
        return self.bounds[rank], self.bounds[rank + 1]

    def with_dim(self, dim: int) -> RowLayout:
        return self if dim == self.dim else _layout(dim, self.bounds)

    def with_bounds(self, bounds: Bounds) -> RowLayout:
        return self if bounds == self.bounds else _layout(self.dim, bounds)


@lru_cache(maxsize=4096)
def _layout(dim: int, bounds: Bounds) -> RowLayout:
    return RowLayout(dim, bounds)


class BlockLayout(RowLayout):
    """What a dim merged in front of the rows makes of a layout: blocks of rows, and each rank has some of each.

    Of every one of the ``blocks``, rank r owns the rows ``inner[r]:inner[r + 1]``; locally they stand one
    after the other. A rule that treats all rows alike needs no more than ``dim``, ``size`` and ``heights``; it has
    no ``bounds``.
    """

    inner: Bounds
    blocks: int

    def __init__(self, dim: int, inner: Bounds, blocks: int) -> None:
        known = {"dim": dim, "inner": inner, "blocks": blocks, "size": blocks * inner[-1], "is_tiny": _is_tiny(inner)}
        for name, value in known.items():
            object.__setattr__(self, name, value)

    @property
    def bounds(self) -> Bounds:  # type: ignore[override]
        raise AssertionError(f"the rows of {self} are not in order: its rule must not be marked any_order")

    @property
    def world_size(self) -> int:
        return len(self.inner) - 1

    @property
    def heights(self) -> tuple[int, ...]:
        return tuple(self.blocks * (hi - lo) for lo, hi in pairwise(self.inner))

    @property
    def opened(self) -> RowLayout:
        """The layout where blocks and rows are two dims again."""
        return _layout(self.dim + 1, self.inner)

    def with_dim(self, dim: int) -> RowLayout:
        return self if dim == self.dim else BlockLayout(dim, self.inner, self.blocks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockLayout) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"BlockLayout(dim={self.dim}, inner={self.inner}, blocks={self.blocks})"

    @property
    def _key(self) -> tuple[int, Bounds, int]:
        return self.dim, self.inner, self.blocks


@lru_cache(maxsize=4096)
def even_bounds(rows: int, world_size: int) -> Bounds:
    """Bounds that differ by at most one row; the first ranks take the longer shards."""
    share, extra = divmod(rows, world_size)
    return tuple(rank * share + min(rank, extra) for rank in range(world_size + 1))


@lru_cache(maxsize=4096)
def aligned_bounds(bounds: Bounds, unit: int) -> Bounds:
    """The bounds, each moved down to a multiple of ``unit`` rows; the last stays."""
    return (*(b - b % unit for b in bounds[:-1]), bounds[-1])
