"""Recipes made of recipes: what is deferred of one tensor, of several, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distpatch.errors import DistPatchError
from distpatch.layout.stencil import Interval
from distpatch.lazy.recipe import Part, Recipe, Walk, _same


def defer(
    op: str,
    like: Recipe,
    parents: Sequence[Recipe],
    step: Callable[[list[Tensor], list[bool]], Tensor],
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Recipe:
    """What ``step(parts, mine)`` makes of the same rows of all parents; it may write to the parts that are its own."""

    def compute(walk: Walk, lo: int, hi: int) -> Part:
        parts, mine = [], []
        for parent in parents:
            rows, own = walk.rows(parent, lo, hi)
            parts.append(rows)
            mine.append(own)
        result = step(parts, mine)
        return result, all(own or not _same(result, rows) for rows, own in zip(parts, mine))

    return Recipe(like, like.dim, parents, compute, shape, op=op, dtype=dtype)


def defer_stencil(
    op: str,
    parent: Recipe,
    need: Callable[[int, int], Interval],
    step: Callable[[Tensor, int, int], Tensor],
    shape: Sequence[int],
) -> Recipe:
    """Rows [lo, hi) as ``step(rows, lo, hi)`` makes them of rows ``need(lo, hi)`` of the parent."""

    def compute(walk: Walk, lo: int, hi: int) -> Part:
        rows, own = walk.rows(parent, *need(lo, hi))
        result = step(rows, lo, hi)
        return result, own or not _same(result, rows)

    return Recipe(parent, parent.dim, [parent], compute, shape, op=op, row_aligned=False)


def unchanged(op: str, *tensors: Tensor | None) -> Callable[[], None]:
    """A check, for when the rows are computed, that what they are computed with was not written to since."""
    tracked = [t for t in tensors if t is not None and not t.is_inference()]
    versions = [t._version for t in tracked]

    def check() -> None:
        if [t._version for t in tracked] != versions:
            raise DistPatchError(
                f"{op}: a weight was written to after the call and before its result was asked for. Convert the model "
                "with lazy=False, or read the result (x.local) before the weight changes."
            )

    return check
