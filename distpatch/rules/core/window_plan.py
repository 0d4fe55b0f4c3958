"""How an operation with windows is carried out on this rank: found once for all calls that are alike.

By shapes, layouts and options alone, so that every later call of the same kind only looks its plan up (halo.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from distpatch.errors import LayoutError
from distpatch.layout.rows import RowLayout, Stencil
from distpatch.layout.stencil import ceil_div
from distpatch.layout.transfers import RankPlan, plan_rank
from distpatch.lazy.patch_plan import Cut, Share, choose_patch_rows, cut_rows, fewest_calls
from distpatch.tensor.options import Options


class Given(NamedTuple):
    """What decides, beside the operation itself, how it is carried out on a tensor: what its plan is found by.

    ``shape`` and ``weight``: of the tensor, and of a convolution's weight; ``recorded`` as in ``Share``; ``outer``: its
    rows are sharded themselves, over an inner axis.
    """

    shape: torch.Size
    weight: torch.Size
    layout: RowLayout
    rank: int
    options: Options
    dtype: torch.dtype
    kind: str  # of device
    recorded: bool
    outer: bool = False


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """How a call is carried out on this rank.

    ``axis``: which of the last dims is sharded, of those that have windows; below 0 none, and the kernel is called
    once, on whole images, for ``out_rows``. Else the ``stencil`` is that of the rows. ``shape``: of the result on this
    rank; ``size_bytes``: its. ``may_defer``: as far as this tells; ``row_aligned``, of deferred rows: see ``Recipe``.
    """

    axis: int
    out_rows: int
    stencil: Any = None
    rank: RankPlan = None  # type: ignore[assignment]
    cut: Cut = None  # type: ignore[assignment]
    shape: tuple[int, ...] = ()
    size_bytes: int = 0
    may_defer: bool = False
    row_aligned: bool = False


@lru_cache(maxsize=4096)
def plan_windows(
    op: str, given: Given, stencils: tuple[Stencil, ...], *, pads: bool = False, channels: int = 0, fit: bool = False
) -> WindowPlan:
    """The plan of an operation with a stencil along each of the last dims; ``LayoutError`` where nothing comes out.

    With weights ``channels`` come out; ``fit``: the input has those that the weights read.
    """
    spatial = len(stencils)
    sizes = [stencil.out_rows(size) for stencil, size in zip(stencils, given.shape[-spatial:], strict=True)]
    if min(sizes) < 1:
        raise LayoutError(
            f"{op}: an input of shape {tuple(given.shape)} is smaller than the kernel: "
            f"{list(stencils)} give an output of {sizes}"
        )
    axis = given.layout.dim - len(given.shape) + spatial
    if axis < 0:
        return WindowPlan(axis, sizes[0])
    if not given.weight:
        return plan_rows(given, stencils[axis], pads=pads, axis=axis)
    plan, options = plan_rank(given.layout, stencils[axis], given.rank), given.options
    shape = [*given.shape[: -spatial - 1], channels, *sizes]
    shape[given.layout.dim] = rows = plan.rows[1] - plan.rows[0]
    share = _share(given, plan, math.prod(shape))
    patch_rows = choose_patch_rows(options, share, given.weight.numel())
    together, weights = pads and not options.sequential, given.weight.numel()
    cut = cut_rows(stencils[axis], plan, patch_rows, share, pads=pads, together=together, weights=weights)
    may_defer = patch_rows < rows and pads and fit and options.sequential and options.lazy
    size_bytes, aligned = share.out_numel * share.itemsize, may_defer and _is_row_aligned(stencils[axis], plan)
    return WindowPlan(axis, sizes[0], stencils[axis], plan, cut, tuple(shape), size_bytes, may_defer, aligned)


def _is_row_aligned(stencil: Any, plan: RankPlan) -> bool:
    """What a row reads above itself is carried, if it was read: rows that end above their place are not."""
    return stencil.stride == 1 and plan.rows == plan.own and stencil.before < stencil.span


@lru_cache(maxsize=4096)
def plan_rows(
    given: Given, stencil: Stencil, *, pads: bool = False, view: bool = False, growth: int = 1, axis: int = 0
) -> WindowPlan:
    """The plan of an operation along the rows alone, without weights."""
    plan = plan_rank(given.layout, stencil, given.rank)
    rows, own = plan.rows[1] - plan.rows[0], plan.own[1] - plan.own[0]
    share = _share(given, plan, 0)
    largest = share.numel * max(growth * rows, own) // max(own, 1)
    patch_rows = rows if view else ceil_div(rows, fewest_calls(largest))
    cut = cut_rows(stencil, plan, max(patch_rows, 1), share, pads=pads, view=view)
    return WindowPlan(axis, rows, stencil, plan, cut)


def _share(given: Given, plan: RankPlan, out_numel: int) -> Share:
    own = [plan.own[1] - plan.own[0] if d == given.layout.dim else n for d, n in enumerate(given.shape)]
    rows = plan.rows[1] - plan.rows[0]
    return Share(rows, math.prod(own), out_numel, given.dtype.itemsize, given.kind, given.recorded, given.outer)
