"""Splitting and merging dims: rows stay put, or move to where whole new rows can be made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.layout.blocks import BlockLayout, layout_of
from distpatch.layout.rows import MANY, PRIME, Part, RowLayout, aligned_bounds
from distpatch.lazy.row_patches import same_memory
from distpatch.rules.core.aliasing import copied, memory_of, strides_unambiguous
from distpatch.rules.core.fallback import computed_on_all, fallback
from distpatch.rules.core.gather_records import record
from distpatch.rules.core.operands import sizes_of
from distpatch.rules.core.redistribution import redistribute, unmerge_blocks
from distpatch.rules.core.registry import named, nth, rule
from distpatch.rules.core.wrapping import wrap
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils.op_names import op_name


def _keeps_parts(input: PatchTensor, *shape: Any, **kwargs: Any) -> bool:
    """Whether rows that are joined of several tensors stay rows."""
    if not _is_joined(input.row_layout) or "dtype" in kwargs or (shape and isinstance(shape[0], torch.dtype)):
        return True
    shape = _infer(sizes_of(shape, kwargs, "shape", "size"), input.numel())
    return _place_of_rows(input.shape, shape, input.row_layout) is not None


@rule(*named("reshape", "view", "_unsafe_view"), any_order=_keeps_parts, view=True)
def reshape(func: Any, input: PatchTensor, *shape: Any, **kwargs: Any) -> Tensor:
    """Splits and merges dims; rows stay put where the sharded dim is outermost among those merged.

    Where new rows are made of several old ones (or of parts), the bounds are first moved to multiples
    that both can have. Dims merged in front of the sharded one make a ``BlockLayout``.
    """
    if "dtype" in kwargs or (shape and isinstance(shape[0], torch.dtype)):
        return _view_dtype(func, input, *shape, **kwargs)
    shape = _infer(sizes_of(shape, kwargs, "shape", "size"), input.numel())
    x = unmerge_blocks(input)
    old, new = (x.shape, shape) if input.numel() else _as_if_filled(x.shape, shape, x.row_layout)
    place = None if 0 in old or 0 in new else _place(old, new, x.row_layout.dim)
    if place is None and input.numel():
        return fallback(torch.reshape, input, shape)
    if place is None or _are_lost(old, new, x.row_layout, place[0]):
        return computed_on_all(torch.reshape, (input, shape), {})
    dim, blocks = place
    return _placed(func, input, x, shape, dim, _as_it_is(blocks), old, new)


def _is_joined(layout: RowLayout) -> bool:
    return isinstance(layout, BlockLayout) and layout.is_joined


def _is_void(layout: RowLayout) -> bool:
    """Whether rows are counted though there are none (``Part.void``)."""
    return layout.size == 0 and any(part.void for part in layout.parts)


def _has_none(sizes: Sequence[int]) -> bool:
    """Whether one of these sizes is 0, or stands for it (``_as_if_filled``)."""
    return math.prod(sizes) % PRIME == 0


def _are_lost(old: Sequence[int], new: Sequence[int], layout: RowLayout, dim: int) -> bool:
    """Whether rows are made of none: nobody can tell who has which."""
    return _has_none(new[dim + 1 :]) and not _has_none(old[layout.dim + 1 :]) and not _is_void(layout)


def _as_it_is(size: int) -> int:
    """A size that was found as if there were elements (``_as_if_filled``): 0 where there are none."""
    return size if size % PRIME else 0


def _as_if_filled(old: Sequence[int], new: Sequence[int], layout: RowLayout) -> tuple[list[int], list[int]]:
    """Shapes without elements as they would be with some: dims end up where they do on ranks that have any.

    With zeros still, where that cannot be told.
    """
    if new.count(0) != 1:
        return list(old), list(new)
    rows = sum(part.block_count * part.inner[-1] for part in layout.parts) if _is_void(layout) else MANY
    filled = [n or (rows if d == layout.dim else MANY) for d, n in enumerate(old)]
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
    moved, held = x, x.row_layout
    unit = math.lcm(old, new) // old  # whole new rows are made of multiples of this many old rows
    if not (_is_joined(held) or _is_void(held)):
        moved = redistribute(x, held.with_bounds(aligned_bounds(held.bounds, unit)), func)
    parts = [part._replace(inner=aligned_bounds(part.inner, unit)) for part in held.parts]  # of joined ones as they are
    parts = [part._replace(inner=tuple(b * old // new for b in part.inner)) for part in parts]
    in_front = [*old_sizes[: held.dim]]
    if x is not input:  # its blocks, which are one dim here, were several
        in_front[-1:] = input.row_layout.parts[0].blocks
    front = _sizes_in_front(in_front, blocks)
    if _is_joined(held):
        layout = layout_of(dim, parts * blocks)
    else:
        layout = layout_of(dim, [Part(parts[0].inner, front + parts[0].blocks)])
        if isinstance(moved.local, PatchTensor):
            moved = _shared_out_alike(moved, shape, layout)
    sizes = [layout.height(x.rank) if d == dim else n for d, n in enumerate(shape)]
    local = moved.local.reshape(sizes)
    is_view = same_memory(local, input.local)
    if is_view and not strides_unambiguous(x) and not _has_view(input, shape):
        local = local.clone()
    result = wrap(local, x, layout)
    return result if is_view else _of_view(result, input, func)


def _sizes_in_front(sizes: Sequence[int], blocks: int) -> tuple[int, ...]:
    """The sizes of the last of these dims, which make so many blocks; one size, where that cuts one of them."""
    for at in range(len(sizes), -1, -1):
        if math.prod(sizes[at:]) == blocks:
            return tuple(n for n in sizes[at:] if n != 1)
    return (blocks,)


def _shared_out_alike(x: PatchTensor, shape: Sequence[int], new: RowLayout) -> PatchTensor:
    """The tensor, whose rows are gathered over an inner axis where that would share them out by how many there are.

    Ranks of this axis that have not as many rows of ``x`` would have the parts of other rows, and could no longer
    exchange theirs. All of them know whether that is so for any.
    """
    part: Any = x.local
    while isinstance(part, PatchTensor):
        opened, row, places = unmerge_blocks(part), x.row_layout.dim, set()
        both = part.row_layout.dim == row  # axes share it out
        row += opened.ndim - part.ndim if part.row_layout.dim < row else 0
        sizes_of_ranks = [*zip(x.row_layout.heights, new.heights)]
        for own, height in [*sizes_of_ranks, (1, 1)] if both else sizes_of_ranks:  # where there are none, a dummy row
            old = [own if d == row else n for d, n in enumerate(opened.shape)]
            sizes = [height if d == new.dim else n for d, n in enumerate(shape)]
            places.add(_place_of_rows(old, sizes, opened.row_layout))
        if both:  # who has which of them differs among ranks: they must stay as they are
            stays = math.prod(x.shape[row + 1 :]) == math.prod(shape[new.dim + 1 :])
            places = {place and place[0][0] == new.dim for place in places} if stays else {None}
        if len(places) == 1 and not places & {None, False}:
            part = part.local
            continue
        record("reshape", [part])
        x = wrap(_gathered_inside(x.local, part), x)
        part = x.local
    return x


def _place_of_rows(old: Sequence[int], new: Sequence[int], layout: RowLayout) -> Any:
    """Where the rows of an inner axis stand in the new shape, and who has which; None where nobody can tell."""
    old, new = (old, new) if 0 not in old else _as_if_filled(old, new, layout)
    place = None if 0 in old or 0 in new else _place(old, new, layout.dim)
    if place is None or _are_lost(old, new, layout, place[0]):
        return None
    before, after = math.prod(old[layout.dim + 1 :]), math.prod(new[place[0] + 1 :])
    if _is_joined(layout):
        exact = all(b * before % after == 0 for part in layout.parts for b in part.inner)
        return (place, len(layout.parts)) if exact else None
    unit = math.lcm(before, after) // before
    return place, aligned_bounds(layout.parts[0].inner, unit)


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
    size 1 stand between) it is the first that is not of size 1; for a single row, the nearest that has as many
    elements behind it as the row had.
    """
    in_front = math.prod(old[:dim])
    fits = [at for at in range(len(new)) if math.prod(new[:at]) == in_front]
    if not fits:
        return _merged_place(old, new, dim)
    if old[dim] == 1:
        behind = math.prod(old[dim + 1 :])
        return min(fits, key=lambda at: (math.prod(new[at + 1 :]) != behind, abs(at - dim))), 1
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
    except (RuntimeError, ValueError):  # the latter of fake tensors
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


@rule(*named("unflatten"), any_order=True, view=True)
def unflatten(func: Any, input: PatchTensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Beside the rows locally: of dims of size 1, shapes alone do not tell which one the rows are."""
    at, row = nth(dim, input.ndim), input.row_layout.dim
    known = -math.prod(sizes) if -1 in sizes else math.prod(sizes)
    sizes = [input.shape[at] // max(known, 1) if n == -1 else n for n in sizes]
    if math.prod(sizes) != input.shape[at]:
        raise RuntimeError(f"unflatten: sizes {sizes} do not multiply up to {input.shape[at]}, of dim {dim}")
    if at == row:
        return input.reshape(*input.shape[:at], *sizes, *input.shape[at + 1 :])
    layout = input.row_layout.with_dim(row + (len(sizes) - 1 if row > at else 0))
    return wrap(input.local.unflatten(at, sizes), input, layout)
