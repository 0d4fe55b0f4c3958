"""Functions of rows: what they compute is deferred, computed now, or computed some rows at a time. Decided here alone.

A rule gives a ``Step``: from rows of its operands to rows of its result. Row i of the result is made of rows i of
the operands, or of rows ``need(lo, hi)`` where it says so. Everything is local; halos are fetched by halo.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from distpatch.layout.rows import RowLayout
from distpatch.layout.stencil import Interval
from distpatch.lazy import recipe as lazy
from distpatch.lazy.deferred_ops import Step, defer
from distpatch.lazy.recipe import Recipe
from distpatch.lazy.row_patches import rows_now
from distpatch.rules.core.wrapping import wrap
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.memory_format import format_by_order

Need = Callable[[int, int], Interval]


def run_rows(
    op: str,
    operands: Sequence[PatchTensor],
    step: Step,
    *,
    need: Need | None = None,
    shape: Sequence[int] | None = None,
    layout: RowLayout | None = None,
    may_defer: bool = True,
    fused: bool = False,
    chunk_rows: int | None = None,
) -> PatchTensor:
    """The rows that ``step`` makes of those of all operands, which are sharded alike; deferred if that may be.

    ``shape``: of the result on this rank, where it is not found by trying the step on no rows; ``fused``: it costs
    so little that operands which are deferred and expensive stay deferred; ``chunk_rows``: how many at a time.
    """
    lead = operands[0]
    recipes = deferrable(operands, lead, fused=fused) if may_defer else None
    if recipes is not None and (later := _later(op, recipes, step, need, shape)) is not None:
        return lead if later is recipes[0] else wrap(later, lead, layout)
    locals_ = [x.local for x in operands]
    result = rows_now(step, locals_, lead.row_layout.dim, need=need, shape=shape, chunk_rows=chunk_rows)
    return lead if result is locals_[0] else wrap(result, lead, layout)


def deferrable(
    operands: Sequence[PatchTensor], lead: PatchTensor, *, fused: bool = False, size_bytes: int | None = None
) -> list[Recipe] | None:
    """Recipes of the operands, if what is made of them, of so many bytes, may be deferred."""
    if size_bytes is None and len(operands) > 1:
        size_bytes = sum(x.local_or_recipe.shape.numel() * x.dtype.itemsize for x in operands)
    if not may_pay(lead, size_bytes) or torch.compiler.is_compiling():
        return None
    if not all(_may_be_read_later(x, lead) for x in operands):
        return None
    for x in operands:
        if x.is_deferred and (_is_dead_end(x.recipe) if fused else _is_costly(x.recipe)):
            x.materialize()
    return [x.as_recipe for x in operands]


def may_pay(x: PatchTensor, size_bytes: int | None = None) -> bool:
    """Whether to ask for more: only large rows without gradients, of a model that was converted so, are deferred."""
    if not x.region.options.lazy or torch.is_grad_enabled():
        return False
    if size_bytes is None:
        rows = x.local_or_recipe
        size_bytes = rows.shape.numel() * rows.dtype.itemsize
    return size_bytes >= lazy.LEAST_BYTES


def _may_be_read_later(x: PatchTensor, lead: PatchTensor) -> bool:
    rows = x.local_or_recipe
    return (
        type(x) is PatchTensor
        and x.row_layout == lead.row_layout
        and x.ndim == lead.ndim
        and x.region.comm is lead.region.comm
        and x.strides is None
        and not x.row_stride
        and rows.dtype.is_floating_point
        and rows.shape.numel() > 0
        and rows.device.type != "meta"
        and not torch.is_autocast_enabled(rows.device.type)
        and (x.is_deferred or format_by_order(x.local.shape, x.local.stride()) is not None)
        and x.as_recipe.format is lead.as_recipe.format
    )


def _is_costly(recipe: Recipe) -> bool:
    """Rows that are expensive, or keep more alive than they are, are computed at their next consumer."""
    return recipe.expensive or recipe.consumers > 0 or recipe.held_bytes > recipe.size_bytes


def _is_dead_end(recipe: Recipe) -> bool:
    """They would be computed twice, or never."""
    return (recipe.expensive and recipe.consumers > 0) or recipe.steps >= lazy.MOST_STEPS


def _later(op: str, recipes: list[Recipe], step: Step, need: Need | None, shape: Sequence[int] | None) -> Recipe | None:
    """None where the result is not such that it may be deferred; the first recipe, where it is the step's result."""
    like, dtype = recipes[0], recipes[0].dtype
    if shape is None:
        samples = [recipe.sample() for recipe in recipes]
        sample = step(samples, [], 0, 0)
        if sample is samples[0]:  # such as to a dtype that it has
            return like
        if sample.device != like.device or not sample.dtype.is_floating_point:
            return None
        shape, dtype = [like.num_rows if d == like.dim else n for d, n in enumerate(sample.shape)], sample.dtype
    recipe = defer(op, recipes, step, need=need, shape=shape, dtype=dtype)
    return recipe if recipe.held_bytes <= lazy.MOST_HELD * recipe.size_bytes else None
