"""Recipes made of recipes: functions of the same rows, sliding windows, and what must not change until they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from distpatch.errors import DistPatchError
from distpatch.layout.stencil import Interval, WindowStencil
from distpatch.layout.transfers import RankPlan
from distpatch.lazy.recipe import Part, Recipe, Walk
from distpatch.lazy.row_patches import Slab, same_memory
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
        return result, all(own or not same_memory(result, rows) for rows, own in read)

    like = parents[0]
    return Recipe(like, like.dim, parents, compute, shape, op=op, dtype=dtype, row_aligned=need is None)


def defer_window(
    op: str,
    kernel: Callable[[Tensor, int, int, int], Tensor],
    slab: Slab,
    stencil: WindowStencil,
    plan: RankPlan,
    shape: Sequence[int],
    format: torch.memory_format,
    patch_rows: int,
) -> Recipe:
    """The output rows of a sliding window over rows that may be deferred; theirs are shape and format."""
    source, dim, out = slab.pieces[slab.local][1], slab.dim, plan.rows[0]
    if (planned_for.kind or source.device.type) == "cpu":
        _keep_freed_patches()
    key = object()

    def compute(walk: Walk, lo: int, hi: int) -> Part:
        def read(a: int, b: int) -> Tensor:
            return slab.rows(a, b, lambda i, j: walk.rows(source, i, j)[0])

        a, b = stencil.need(out + lo, out + hi)
        if source.value is not None and not walk.overwrites:
            rows = read(a, b)
        else:
            rows = walk.window(key, a, b, stencil.need(out + hi, out + hi + 1)[0], dim, read)
        return kernel(rows, a, out + lo, out + hi), True

    # What a row reads above itself is carried, if it was read: rows that end above their place are not.
    row_aligned = stencil.stride == 1 and plan.rows == plan.own and stencil.before < stencil.span
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
    )


@cache
def _keep_freed_patches() -> None:
    """Let malloc keep what a patch has freed for the next one: to be given fresh pages takes longer than to use them.

    glibc gives free memory back beyond twice the largest block that was freed so far, of up to 32 MiB. This one is
    never touched, so that it costs no memory.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


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
