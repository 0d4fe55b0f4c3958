"""Splitting and merging dims: rows stay put, or move to where whole new rows can be made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distpatch.layout.rows import BlockLayout, RowLayout, aligned_bounds
from distpatch.rules.core.aliasing import copied, memory_of, strides_unambiguous
from distpatch.rules.core.fallback import computed_on_all, fallback
from distpatch.rules.core.gather_records import record
from distpatch.rules.core.operands import redistribute, shares_memory, sizes_of, unmerge_blocks, wrap
from distpatch.rules.core.registry import named, nth, rule
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils.op_names import op_name

MANY = (1 << 61) - 1  # a prime, larger than any size


@rule(*named("reshape", "view", "_unsafe_view"), any_order=True, view=True)
def reshape(func: Any, input: PatchTensor, *shape: Any, **kwargs: Any) -> Tensor:
    """Splits and merges dims; rows stay put where the sharded dim is outermost among those merged.

    Where new rows are made of several old ones (or of parts), the bounds are first moved to multiples
    that both can have. Dims merged in front of the sharded one make a ``BlockLayout``.
    """
    if "dtype" in kwargs or (shape and isinstance(shape[0], torch.dtype)):
        return _view_dtype(func, input, *shape, **kwargs)
    shape = _infer(sizes_of(shape, kwargs, "shape", "size"), input.numel())
    x = unmerge_blocks(input)
    old, new = (x.shape, shape) if input.numel() else _as_if_filled(x.shape, shape)
    place = None if 0 in old or 0 in new else _place(old, new, x.row_layout.dim)
    if place is None and input.numel():
        return fallback(torch.reshape, input, shape)
    if place is None or _are_lost(old, new, x.row_layout.dim, place[0]):
        return computed_on_all(torch.reshape, (input, shape), {})
    dim, blocks = place
    return _placed(func, input, x, shape, dim, _as_it_is(blocks), old, new)


def _are_lost(old: Sequence[int], new: Sequence[int], row: int, dim: int) -> bool:
    """Whether rows are merged with a dim that has no elements: nobody can tell then who had which."""
    return (math.prod(old[row + 1 :]) % MANY == 0) != (math.prod(new[dim + 1 :]) % MANY == 0)


def _as_it_is(size: int) -> int:
    """A size that was found as if there were elements (``_as_if_filled``): 0 where there are none."""
    return size if size % MANY else 0


def _as_if_filled(old: Sequence[int], new: Sequence[int]) -> tuple[list[int], list[int]]:
    """Shapes without elements as they would be with some: dims end up where they do on ranks that have any.

    With zeros still, where that cannot be told.
    """
    if new.count(0) != 1:
        return list(old), list(new)
    fill = MANY * math.prod(n for n in new if n)
    filled = [n or fill for n in old]
    rest, remainder = divmod(math.prod(filled), math.prod(n for n in new if n))
    return (list(old), list(new)) if remainder else (filled, [n or rest for n in new])


def _placed(
    func: Any,
    input: PatchTensor,
    x: PatchTensor,
    shape: tuple[int, ...],
    dim: int,
    blocks: int,
    old_sizes: Sequence[int],
    new_sizes: Sequence[int],
) -> Tensor:
    """``x`` (``input``, its blocks opened) in a shape where its rows begin dim ``dim``, or blocks in it.

    ``old_sizes``, ``new_sizes``: both shapes, without zeros.
    """
    old, new = math.prod(old_sizes[x.row_layout.dim + 1 :]), math.prod(new_sizes[dim + 1 :])
    unit = math.lcm(old, new) // old  # whole new rows are made of multiples of this many old rows
    moved = redistribute(x, x.row_layout.with_bounds(aligned_bounds(x.row_layout.bounds, unit)), func)
    bounds = tuple(_as_it_is(b * old // new) for b in moved.row_layout.bounds)
    if isinstance(moved.local, PatchTensor):
        moved = _shared_out_alike(moved, shape, dim, blocks, bounds)
    lo, hi = bounds[x.rank : x.rank + 2]
    sizes = [blocks * (hi - lo) if d == dim else n for d, n in enumerate(shape)]
    layout = RowLayout(dim, bounds) if blocks == 1 else BlockLayout(dim, bounds, blocks)
    local = moved.local.reshape(sizes)
    is_view = shares_memory(local, input.local)
    if is_view and not strides_unambiguous(x) and not _has_view(input, shape):
        local = local.clone()
    result = wrap(local, x, layout)
    return result if is_view else _of_view(result, input, func)


def _shared_out_alike(
    x: PatchTensor, shape: Sequence[int], dim: int, blocks: int, bounds: Sequence[int]
) -> PatchTensor:
    """The tensor, whose rows are gathered over an inner axis where that would share them out by how many there are.

    Ranks of this axis that have not as many rows of ``x`` would have the parts of other rows, and could no longer
    exchange theirs. All of them know whether that is so for any.
    """
    part: Any = x.local
    while isinstance(part, PatchTensor):
        whole_blocks = unmerge_blocks(part)
        layout, row = whole_blocks.row_layout, x.row_layout.dim + (part is not whole_blocks)
        places = set()
        for own, new in zip(x.row_layout.heights, _heights(bounds)):
            old = [own if d == row else n for d, n in enumerate(whole_blocks.shape)]
            sizes = [blocks * new if d == dim else n for d, n in enumerate(shape)]
            places.add(_place_of_rows(old, sizes, layout))
        if layout.dim != row and len(places) == 1 and None not in places:
            part = part.local
            continue
        record("reshape", [part])
        x = wrap(_gathered_inside(x.local, part), x)
        part = x.local
    return x


def _place_of_rows(old: Sequence[int], new: Sequence[int], layout: RowLayout) -> Any:
    """Where the rows of an inner axis stand in the new shape, and who has which; None where nobody can tell."""
    old, new = (old, new) if 0 not in old else _as_if_filled(old, new)
    place = None if 0 in old or 0 in new else _place(old, new, layout.dim)
    if place is None or _are_lost(old, new, layout.dim, place[0]):
        return None
    before, after = math.prod(old[layout.dim + 1 :]), math.prod(new[place[0] + 1 :])
    unit = math.lcm(before, after) // before
    return place, aligned_bounds(layout.bounds, unit)


def _heights(bounds: Sequence[int]) -> list[int]:
    return [hi - lo for lo, hi in pairwise(bounds)]


def _gathered_inside(rows: Any, part: PatchTensor) -> Tensor:
    """The rows, of which ``part``, themselves or what they are made of, is gathered."""
    return gather_replicated(rows) if rows is part else wrap(_gathered_inside(rows.local, part), rows)


def _infer(shape: tuple[int, ...], numel: int) -> tuple[int, ...]:
    if -1 in shape:
        known = math.prod(n for n in shape if n != -1)
        if not known:
            raise RuntimeError(
                f"cannot reshape tensor of 0 elements into shape {list(shape)} because the unspecified dimension size "
                "-1 can be any value and is ambiguous"
            )
        shape = tuple(numel // max(known, 1) if n == -1 else n for n in shape)
    if math.prod(shape) != numel:
        raise RuntimeError(f"shape {list(shape)} is invalid for input of size {numel}")
    return shape


def _place(old: Sequence[int], new: Sequence[int], dim: int) -> tuple[int, int] | None:
    """Where the rows of ``old[dim]`` stand in ``new``: (dim, blocks).

    Rows can begin at a dim that has as many elements in front of it as they had. Of several (dims of
    size 1 stand between) it is the first that is not of size 1; for a single row, the nearest.
    """
    in_front = math.prod(old[:dim])
    fits = [at for at in range(len(new)) if math.prod(new[:at]) == in_front]
    if not fits:
        return _merged_place(old, new, dim)
    if old[dim] == 1:
        return min(fits, key=lambda at: abs(at - dim)), 1
    return next((at for at in fits if new[at] != 1), fits[-1]), 1


def _merged_place(old: Sequence[int], new: Sequence[int], dim: int) -> tuple[int, int] | None:
    """Where ``old[dim]`` ends up in ``new`` behind dims merged in front of it: (new dim, blocks)."""
    in_front = size = 1
    for n in old[:dim]:
        in_front *= n
    for at, n in enumerate(new):
        blocks, rest = divmod(in_front, size)
        if rest or blocks < 1:
            return None
        if n > 1 and n % blocks == 0 and blocks > 1:
            return at, blocks
        size *= n
    return None


def _of_view(result: PatchTensor, source: PatchTensor, func: Any) -> Tensor:
    """``result``, a copy; where it is a view on one device, what is written to it is written back."""
    told = op_name(func) != "reshape"  # else by the strides, which of a slice of other dims do not tell
    if not told and not _has_view(source, result.shape):
        return result

    def write() -> None:
        source.copy_(result.reshape(source.shape))

    return copied(result, source, func, write if told or not _has_gaps(source.local) else None)


def _has_gaps(local: Tensor) -> bool:
    span = sum((n - 1) * stride for n, stride in zip(local.shape, local.stride()))
    return local.numel() > 0 and span >= local.numel()


def _has_view(x: PatchTensor, shape: Sequence[int]) -> bool:
    """Whether on one device it can be seen in this shape without a copy."""
    try:
        memory_of(x).view(shape)
    except RuntimeError:
        return False
    return True


def _view_dtype(func: Any, input: PatchTensor, dtype: torch.dtype) -> Tensor:
    """The same bytes as other numbers; another size of number changes the last dim."""
    local = input.local.view(dtype)
    if input.row_layout.dim == input.ndim - 1 and local.element_size() != input.element_size():
        return NotImplemented
    return wrap(local, input)


@rule(*named("flatten"), any_order=True, view=True)
def flatten(func: Any, input: PatchTensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    first, last = nth(start_dim, input.ndim), nth(end_dim, input.ndim)
    shape = (*input.shape[:first], math.prod(input.shape[first : last + 1]), *input.shape[last + 1 :])
    row = input.row_layout.dim
    if not first <= row <= last or input.numel() == 0 or isinstance(input.row_layout, BlockLayout):
        return input.reshape(shape)
    return _placed(torch.reshape, input, input, shape, first, math.prod(input.shape[first:row]), input.shape, shape)
