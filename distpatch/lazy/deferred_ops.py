"""Recipes made of recipes: functions of the same rows, sliding windows, and what must not change until they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from distpatch.errors import DistPatchError
from distpatch.layout.stencil import Interval, WindowStencil
from distpatch.lazy.recipe import Part, Recipe, Walk
from distpatch.lazy.row_patches import Slab
from distpatch.torch_utils.chunk_sizes import planned_for

# (rows of each operand, those of them or of the result that it may write to, start, stop) -> rows [start, stop)
Step = Callable[[Sequence[Tensor], Sequence[Tensor], int, int], Tensor]
Need = Callable[[int, int], Interval]


def defer(
    op: str,
    parents: Sequence[Recipe],
    step: Step,
    *,
    need: Need | None = None,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Recipe:
    """What ``step`` makes of the same rows of all parents, or of their rows ``need(start, stop)``."""

    def compute(walk: Walk, lo: int, hi: int) -> Part:
        start, stop = need(lo, hi) if need else (lo, hi)
        read = [walk.rows(parent, start, stop) for parent in parents]
        result = step([rows for rows, _ in read], [rows for rows, own in read if own], lo, hi)
        memories = [rows.untyped_storage()._cdata for rows, own in read if not own]
        return result, result.untyped_storage()._cdata not in memories

    like = parents[0]
    return Recipe(like, like.dim, parents, compute, shape, op=op, dtype=dtype, row_aligned=need is None)


@dataclass(frozen=True, eq=False)
class OfRows:
    """The ``Step`` of a function that computes each element by itself: of rows, at these ``places``, and of constants.

    ``inplace``: it can be told to write to the first rows, and ``out`` to others, that are like the ``sample`` but in
    dim ``row``.
    """

    func: Callable[..., Any]
    constants: list[Any]
    kwargs: dict[str, Any]
    places: list[int]
    inplace: bool
    out: Callable[..., Any] | None
    sample: Tensor
    row: int

    def __call__(self, parts: Sequence[Tensor], spare: Sequence[Tensor], lo: int, hi: int) -> Any:
        operands = list(self.constants)
        for i, part in zip(self.places, parts):
            operands[i] = part
        if self.inplace and any(rows is parts[0] for rows in spare):
            return self.func(*operands, **self.kwargs, inplace=True)
        if self.out is not None:
            for rows in spare:
                if rows.dtype == self.sample.dtype and all(
                    n == m for d, (n, m) in enumerate(zip(rows.shape, self.sample.shape)) if d != self.row
                ):
                    return self.out(*operands, **self.kwargs, out=rows)
        return self.func(*operands, **self.kwargs)


def defer_window(
    op: str,
    kernel: Callable[[Tensor, int, int, int], Tensor],
    slab: Slab,
    stencil: WindowStencil,
    place: int,
    shape: Sequence[int],
    format: torch.memory_format,
    patch_rows: int,
    row_aligned: bool,
    top_last: bool,
) -> Recipe:
    """Output rows from ``place`` on of a window over rows that may be deferred; theirs are shape and format."""
    source, dim = slab.pieces[slab.local][1], slab.dim
    if (planned_for.kind or source.device.type) == "cpu":
        _keep_freed_patches()
    key = object()

    def compute(walk: Walk, lo: int, hi: int) -> Part:
        def read(a: int, b: int) -> Tensor:
            return slab.rows(a, b, lambda i, j: walk.rows(source, i, j)[0])

        a, b = stencil.need(place + lo, place + hi)
        if source.value is not None and not walk.overwrites:
            rows = read(a, b)
        else:
            follow, above = stencil.need(place + hi, place + hi + 1)[0], stencil.need(place + lo - 1, place + lo)[1]
            rows = walk.window(key, a, b, follow, above, dim, read)
        return kernel(rows, a, place + lo, place + hi), True

    return Recipe(
        source,
        dim,
        [source],
        compute,
        shape,
        op=op,
        format=format,
        row_aligned=row_aligned,
        expensive=True,
        patch_rows=patch_rows,
        top_last=top_last,
    )


def detached_recipe(recipe: Recipe) -> Recipe:
    """The same, for a tensor that will be written to: what others make of it stays as it is."""
    if not recipe.consumers:
        return recipe
    return Recipe(
        recipe,
        recipe.dim,
        recipe.parents,
        recipe.compute,
        op=recipe.op,
        row_aligned=recipe.row_aligned,
        expensive=recipe.expensive,
        patch_rows=recipe.patch_rows,
        top_last=recipe.top_last,
    )


@cache
def _keep_freed_patches() -> None:
    """Let malloc keep what a patch has freed for the next one: to be given fresh pages takes longer than to use them.

    glibc gives free memory back beyond twice the largest block that was freed so far, of up to 32 MiB. This one is
    never touched, so that it costs no memory; it is no tensor, which a plan would make a fake one of, and count.
    """
    torch.UntypedStorage((32 << 20) - (64 << 10))


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
