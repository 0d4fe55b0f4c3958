"""Shape: the rows stay where they are, and the layout says which dim they are now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.layout import RowLayout, aligned_bounds
from distpatch.rules.fallback import fallback
from distpatch.rules.registry import (
    crop,
    named,
    normalize_dims,
    redistribute,
    rule,
    spread,
    wrap,
)
from distpatch.stencil import ceil_div
from distpatch.tensor import PatchTensor, whole


def _moved(x: PatchTensor, local: Tensor, order: Sequence[int]) -> PatchTensor:
    """``order[i]``: the old dim that is now dim i."""
    return wrap(local, x, x.rows.with_dim(list(order).index(x.rows.dim)))


@rule(*named("permute"))
def permute(func: Any, input: PatchTensor, *dims: Any, **kwargs: Any) -> PatchTensor:
    dims = kwargs.get("dims", dims)
    if len(dims) == 1 and not isinstance(dims[0], int):
        dims = dims[0]
    order = [d % input.ndim for d in dims]
    return _moved(input, input.local.permute(order), order)


@rule(*named("transpose", "swapaxes", "swapdims"))
def transpose(func: Any, input: PatchTensor, dim0: int, dim1: int) -> PatchTensor:
    order = list(range(input.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _moved(input, input.local.transpose(dim0, dim1), order)


@rule(*named("movedim", "moveaxis"))
def movedim(func: Any, input: PatchTensor, source: Any, destination: Any) -> PatchTensor:
    sources = normalize_dims(source, input.ndim)
    targets = normalize_dims(destination, input.ndim)
    rest = iter(d for d in range(input.ndim) if d not in sources)
    placed = dict(zip(targets, sources, strict=True))
    order = [placed[d] if d in placed else next(rest) for d in range(input.ndim)]
    return _moved(input, input.local.permute(order), order)


@rule(*named("t", "adjoint"), *(getattr(torch.Tensor, n).__get__ for n in ("T", "mT", "H", "mH")))
def turn(func: Any, input: PatchTensor) -> PatchTensor:
    order = list(range(input.ndim))
    if input.ndim > 1:
        order[-2:] = order[-1], order[-2]
    return _moved(input, func(input.local), order)


@rule(*named("unsqueeze"))
def unsqueeze(func: Any, input: PatchTensor, dim: int) -> PatchTensor:
    at = dim % (input.ndim + 1)
    return wrap(input.local.unsqueeze(at), input, input.rows.with_dim(input.rows.dim + (at <= input.rows.dim)))


@rule(*named("squeeze"))
def squeeze(func: Any, input: PatchTensor, dim: Any = None) -> Tensor:
    dims = [d for d in normalize_dims(dim, input.ndim) if input.shape[d] == 1]
    if input.rows.dim in dims:  # a tensor of one row is somebody's, and everybody's once it is no row
        return func(whole(input), dims)
    kept = input.rows.dim - sum(d < input.rows.dim for d in dims)
    return wrap(input.local.squeeze(tuple(dims)), input, input.rows.with_dim(kept))


@rule(*named("flatten"))
def flatten(func: Any, input: PatchTensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    first, last = start_dim % input.ndim, end_dim % input.ndim
    merged = math.prod(input.shape[first : last + 1])
    return reshape(torch.reshape, input, (*input.shape[:first], merged, *input.shape[last + 1 :]))


@rule(*named("unflatten"))
def unflatten(func: Any, input: PatchTensor, dim: int, sizes: Sequence[int]) -> Tensor:
    at = dim % input.ndim
    sizes = _infer(tuple(sizes), input.shape[at])
    return reshape(torch.reshape, input, (*input.shape[:at], *sizes, *input.shape[at + 1 :]))


@rule(*named("reshape", "view", "_unsafe_view"))
def reshape(func: Any, input: PatchTensor, *shape: Any, **kwargs: Any) -> Tensor:
    """Splits and merges dims; rows stay put where the sharded dim is outermost among those merged.

    Where new rows are made of several old ones (or of parts), the bounds are first moved to multiples
    that both can have. A dim merged in front of the sharded one would scatter its rows: gathered.
    """
    if (shape and isinstance(shape[0], torch.dtype)) or "dtype" in kwargs:
        return fallback(func, input, *shape, **kwargs)
    shape = kwargs.get("shape", kwargs.get("size", shape))
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = shape[0]
    shape = _infer(tuple(shape), input.numel())
    place = _place(input.shape, shape, input.rows.dim)
    if place is None:
        return fallback(torch.reshape, input, shape)
    dim, old, new = place
    rows = input.rows
    unit = math.lcm(old, new) // old  # whole new rows are made of multiples of this many old rows
    input = redistribute(input, rows.with_bounds(aligned_bounds(rows.bounds, unit)), func)
    bounds = tuple(b * old // new for b in input.rows.bounds)
    rank = input.region.comm.rank
    local = [bounds[rank + 1] - bounds[rank] if d == dim else n for d, n in enumerate(shape)]
    return wrap(input.local.reshape(local), input, RowLayout(dim, bounds))


def _infer(shape: tuple[int, ...], numel: int) -> tuple[int, ...]:
    if -1 in shape:
        known = math.prod(n for n in shape if n != -1)
        shape = tuple(numel // max(known, 1) if n == -1 else n for n in shape)
    if math.prod(shape) != numel:
        raise RuntimeError(f"shape {shape} is invalid for input of size {numel}")
    return shape


def _place(old: Sequence[int], new: Sequence[int], dim: int) -> tuple[int, int, int] | None:
    """Where the rows of ``old[dim]`` stand in ``new``: (new dim, elements of an old row, of a new row).

    Rows can begin at a dim that has as many elements in front of it as they had. Of several (dims of
    size 1 stand between) it is the first that is not of size 1; for a single row, the nearest.
    """
    in_front = math.prod(old[:dim])
    fits = [at for at in range(len(new)) if math.prod(new[:at]) == in_front]
    if not fits:
        return None
    if old[dim] == 1:
        at = min(fits, key=lambda at: abs(at - dim))
    else:
        at = next((at for at in fits if new[at] != 1), fits[-1])
    return at, math.prod(old[dim + 1 :]), math.prod(new[at + 1 :])


@rule(*named("view_as", "reshape_as"))
def reshape_as(func: Any, input: Tensor, other: Tensor) -> Tensor:
    return input.reshape(other.shape)


@rule(*named("expand", "broadcast_to"))
def expand(func: Any, input: PatchTensor, *shape: Any, **kwargs: Any) -> Tensor:
    shape = kwargs.get("size", shape)
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = shape[0]
    dim = len(shape) - input.ndim + input.rows.dim
    if shape[dim] not in (-1, input.rows.size):  # a single row is repeated: everybody's
        return whole(input).expand(shape)
    sizes = [-1 if d == dim else n for d, n in enumerate(shape)]
    return wrap(input.local.expand(sizes), input, input.rows.with_dim(dim))


@rule(*named("expand_as"))
def expand_as(func: Any, input: Tensor, other: Tensor) -> Tensor:
    return input.expand(other.shape)


@rule(*named("repeat", "tile"))
def repeat(func: Any, input: PatchTensor, *repeats: Any, **kwargs: Any) -> Any:
    times = kwargs.get("repeats", kwargs.get("dims", repeats))
    if len(times) == 1 and not isinstance(times[0], int):
        times = times[0]
    times = (1,) * (input.ndim - len(times)) + tuple(times)
    dim = len(times) - input.ndim + input.rows.dim
    if times[dim] != 1:
        return fallback(func, input, *times)
    return wrap(input.local.repeat(times), input, input.rows.with_dim(dim))


@rule(*named("cat", "concat", "concatenate"))
def cat(func: Any, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Tensor:
    """Along another dim locally, after the first sharded tensor's layout; along the rows by moving them."""
    dim = kwargs.get("axis", dim)
    tensors = [t for t in tensors if t.shape != (0,)]
    lead = next(t for t in tensors if isinstance(t, PatchTensor))
    at = dim % lead.ndim
    if at == lead.rows.dim:
        return fallback(func, tensors, at)
    return wrap(func([_rows_like(t, lead, func) for t in tensors], at), lead)


@rule(*named("stack"))
def stack(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    lead = next(t for t in tensors if isinstance(t, PatchTensor))
    at = dim % (lead.ndim + 1)
    moved = lead.rows.with_dim(lead.rows.dim + (at <= lead.rows.dim))
    return wrap(func([_rows_like(t, lead, func) for t in tensors], at), lead, moved)


def _rows_like(tensor: Tensor, lead: PatchTensor, func: Any) -> Tensor:
    if isinstance(tensor, PatchTensor):
        return redistribute(tensor, lead.rows, func).local
    lo, hi = lead.rows.interval(lead.region.comm.rank)
    return spread(tensor, lead).narrow(lead.rows.dim, lo, hi - lo)


@rule(*named("chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"))
def split(func: Any, input: PatchTensor, *args: Any, dim: int = 0, **kwargs: Any) -> Any:
    sizes, at = [*args, *kwargs.values(), dim][:2]  # named chunks, split_size, sections, ...
    at %= input.ndim
    if at != input.rows.dim:
        return tuple(wrap(part, input) for part in func(input.local, sizes, at))
    # torch cuts a tensor that has rows and no data, and every rank keeps its own rows of each part.
    counted = func(torch.empty(input.rows.size, 0, device="meta"), sizes, 0)
    parts, start = [], 0
    for part in counted:
        parts.append(crop(input, start, start + len(part)))
        start += len(part)
    return tuple(parts)


@rule(*named("unbind"))
def unbind(func: Any, input: PatchTensor, dim: int = 0) -> Any:
    at = dim % input.ndim
    return tuple(input.select(at, i) for i in range(input.shape[at]))


@rule(*named("narrow"))
def narrow(func: Any, input: PatchTensor, dim: int, start: int, length: int) -> PatchTensor:
    at = dim % input.ndim
    if at != input.rows.dim:
        return wrap(input.local.narrow(at, start, length), input)
    start = start % input.rows.size if start < 0 else start
    if start + length > input.rows.size:
        raise RuntimeError(f"start ({start}) + length ({length}) exceeds dimension size ({input.rows.size}).")
    return crop(input, start, start + length)


@rule(*named("select"))
def select(func: Any, input: PatchTensor, dim: int, index: int) -> Tensor:
    at = dim % input.ndim
    if at == input.rows.dim:
        return one_row(input, index)
    kept = input.rows.dim - (at < input.rows.dim)
    return wrap(input.local.select(at, index), input, input.rows.with_dim(kept))


def one_row(x: PatchTensor, index: int) -> Tensor:
    """A single row is replicated: its owner sends it to all."""
    if not -x.rows.size <= index < x.rows.size:
        raise IndexError(f"index {index} is out of bounds for dimension {x.rows.dim} with size {x.rows.size}")
    index %= x.rows.size
    return whole(crop(x, index, index + 1)).select(x.rows.dim, 0)


@rule(torch.Tensor.__getitem__)
def getitem(func: Any, input: Tensor, index: Any) -> Any:
    """Basic indexing, one item after the other; tensors as indices take the fallback."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(input, PatchTensor) or not all(map(_is_basic, items)):
        return fallback(func, input, index)
    spoken = sum(item is not None and item is not Ellipsis for item in items)
    for at, item in enumerate(items):
        if item is Ellipsis:
            items[at : at + 1] = [slice(None)] * (input.ndim - spoken)
            break
    result: Tensor = input
    dim = 0
    for item in items:
        if isinstance(item, int):
            result = result.select(dim, item)
            continue
        result = result.unsqueeze(dim) if item is None else slice_dim(result, dim, item)
        dim += 1
    return result


def _is_basic(item: Any) -> bool:
    return item is None or item is Ellipsis or isinstance(item, slice) or type(item) is int


def slice_dim(x: Tensor, dim: int, item: slice) -> Tensor:
    """``x[..., item, ...]`` along one dim; each rank keeps its own of the chosen rows."""
    if item == slice(None):
        return x
    if not isinstance(x, PatchTensor):
        return x[(slice(None),) * dim + (item,)]
    if dim != x.rows.dim:
        return wrap(x.local[(slice(None),) * dim + (item,)], x)
    start, stop, step = item.indices(x.rows.size)
    x = crop(x, start, max(stop, start))
    if step == 1:
        return x
    rank, bounds = x.region.comm.rank, tuple(ceil_div(b, step) for b in x.rows.bounds)
    first = bounds[rank] * step - x.rows.bounds[rank]
    local = x.local[(slice(None),) * dim + (slice(first, None, step),)]
    return wrap(local, x, RowLayout(dim, bounds))
