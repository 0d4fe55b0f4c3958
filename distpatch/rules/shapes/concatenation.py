"""Rows put together anew: concatenated, stacked, repeated, rolled, mirrored.

The new rows are a list of intervals of the rows of one or more tensors. Each rank owns an even share of them
(or the bounds that it had) and fetches what these are made of.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distpatch.comm import collectives
from distpatch.layout.blocks import layout_of
from distpatch.layout.rows import Bounds, Part, RowLayout
from distpatch.layout.transfers import padded
from distpatch.rules.core.executor import run_rows
from distpatch.rules.core.operands import check_group, local_rows_of, normalize_dims, replicated_operand, sizes_of
from distpatch.rules.core.redistribution import alike_inside, fetch, in_order, inner_dims, parts_of, redistribute
from distpatch.rules.core.registry import named, nth, rule
from distpatch.rules.core.wrapping import in_memory_of, wrap
from distpatch.tensor.patch_tensor import BlockTensor, PatchTensor
from distpatch.tensor.region import meshes
from distpatch.torch_utils.memory_format import memory_format
from distpatch.torch_utils.op_names import op_name

Segment = tuple[int, int, int]  # (which tensor, start, stop)


def assembled(
    func: Any, tensors: Sequence[Tensor], segments: Sequence[Segment], bounds: Bounds | None = None
) -> PatchTensor:
    """The tensor whose rows are these segments of rows of the tensors, one after the other.

    One exchange for each sharded tensor; plain ones are sliced. Sharded along another dim: turned first.
    """
    if meshes.some:
        tensors = alike_inside(tensors, func)
    lead = next(t for t in tensors if isinstance(t, PatchTensor))
    dim, comm = lead.row_layout.dim, lead.comm
    bounds = bounds or lead.region.bounds(sum(stop - start for _, start, stop in segments))
    shares = _shares(tuple(segments), bounds)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    pieces = []
    for index, tensor in enumerate(tensors):
        needs = padded([[(a, b) for k, a, b in share if k == index] for share in shares])
        if isinstance(tensor, PatchTensor):
            check_group(tensor, lead, func)
            turned = tensor.row_layout.dim != dim
            layout = RowLayout(dim, lead.region.bounds(tensor.shape[dim])) if turned else tensor.row_layout
            pieces.append(iter(fetch(redistribute(tensor, layout, func), needs, func)))
        else:
            plain = replicated_operand(tensor, lead)
            pieces.append(iter([plain.narrow(dim, a, b - a) for a, b in needs[comm.rank]]))
    own = [next(pieces[k]) for k, _, _ in shares[comm.rank]]
    rest = [piece for fetched in pieces for piece in fetched]  # without rows, for the autograd graph
    local = torch.cat([piece.to(dtype) for piece in (*own, *rest)], dim)
    formats = {memory_format(t.local if isinstance(t, PatchTensor) else t) for t in tensors}
    format = formats.pop() if len(formats) == 1 else torch.contiguous_format  # as torch.cat chooses
    return wrap(local.contiguous(memory_format=format), lead, RowLayout(dim, bounds))


@lru_cache(maxsize=1024)
def _shares(segments: tuple[Segment, ...], bounds: Bounds) -> list[list[Segment]]:
    """The parts of the segments that each rank's share of the new rows is made of."""
    shares = []
    for lo, hi in pairwise(bounds):
        share, first = [], 0
        for k, start, stop in segments:
            a, b = max(lo - first, 0) + start, min(hi - first + start, stop)
            if a < b:
                share.append((k, a, b))
            first += stop - start
        shares.append(share)
    return shares


@rule(*named("cat", "concat", "concatenate"), any_order=True)
def cat(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Along another dim locally, after the first sharded tensor's layout; along the rows by moving them."""
    if all(t.shape == (0,) for t in tensors):
        return tensors[0]
    if any(t.ndim != 1 for t in tensors):  # torch lets these stand for none of any shape
        some = [t for t in tensors if t.shape != (0,)]
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
        tensors = some if len(some) == len(tensors) else [t.to(dtype) for t in some]  # of which they still decide
    lead = next(t for t in tensors if isinstance(t, PatchTensor))
    at = nth(dim, lead.ndim)
    if at == lead.row_layout.dim:
        tensors = [t if t.shape[at] else in_order(t) for t in tensors]
        if any(_are_merged(t) for t in tensors):
            return join_rows(func, lead, tensors, at)
        return assembled(func, tensors, [(k, 0, t.shape[at]) for k, t in enumerate(tensors)])
    sharded = [t for t in tensors if isinstance(t, PatchTensor) and t.row_layout == lead.row_layout]
    if len(sharded) == len(tensors):
        for t in sharded:
            check_group(t, lead, func)
        return run_rows(op_name(func), sharded, lambda parts, *_: func(parts, at))
    return wrap(func([local_rows_of(t, lead, lead.row_layout.dim - lead.ndim, func) for t in tensors], at), lead)


def _are_merged(t: Tensor) -> bool:
    """Whether its rows are in blocks, or are sharded over an inner axis too: those would have to be gathered."""
    return isinstance(t, PatchTensor) and (isinstance(t, BlockTensor) or t.row_layout.dim in inner_dims(t))


@rule(collectives.join_parts, any_order=True)
def join_rows(func: Any, lead: Tensor, tensors: Sequence[Tensor], dim: int) -> Any:
    """Concatenated along the rows, which stay where they are: each tensor is a part of the new rows."""
    lead = next(t for t in tensors if isinstance(t, PatchTensor))
    if lead.row_layout.dim != dim:
        return cat(torch.cat, tensors, dim)
    parts: list[Part] = []
    rows = []
    if not lead.region.level:  # ranks of an outer axis may have what those of an inner one have none of
        tensors = [tensor for tensor in tensors if tensor.shape[dim]] or tensors
    for tensor in tensors:
        layout = RowLayout(dim, lead.region.bounds(tensor.shape[dim]))
        if isinstance(tensor, PatchTensor):
            check_group(tensor, lead, func)
            own = tensor if tensor.row_layout.dim == dim else redistribute(tensor, layout, func)
            parts += own.row_layout.parts
            rows += [part.local for part in parts_of(own)]
        else:
            parts += layout.parts
            rows.append(collectives.narrow_rows(replicated_operand(tensor, lead), layout, lead.rank))
    return wrap(collectives.join_rows(rows, dim), lead, layout_of(dim, parts))


@rule(*named("stack"), any_order=True)
def stack(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    lead = next(t for t in tensors if isinstance(t, PatchTensor))
    at = dim % (lead.ndim + 1)
    moved = lead.row_layout.with_dim(lead.row_layout.dim + (at <= lead.row_layout.dim))
    return wrap(func([local_rows_of(t, lead, lead.row_layout.dim - lead.ndim, func) for t in tensors], at), lead, moved)


@rule(*named("repeat", "tile"), any_order=True)
def repeat(func: Any, input: PatchTensor, *repeats: Any, **kwargs: Any) -> Any:
    times = sizes_of(repeats, kwargs, "repeats", "dims")
    times = (1,) * (input.ndim - len(times)) + times
    dim = len(times) - input.ndim + input.row_layout.dim
    others = [1 if d == dim else n for d, n in enumerate(times)]
    result = wrap(input.local.repeat(others), input, input.row_layout.with_dim(dim))
    return result if times[dim] == 1 else assembled(func, [result], [(0, 0, input.row_layout.size)] * times[dim])


def _repeats_beside(input: Tensor, repeats: Any = None, dim: int | None = None, **_: Any) -> bool:
    """Whether what is repeated is along another dim than the rows."""
    return isinstance(input, PatchTensor) and dim is not None and nth(dim, input.ndim) != input.row_layout.dim


@rule(*named("repeat_interleave"), any_order=_repeats_beside)
def repeat_interleave(
    func: Any, input: Tensor, repeats: Any = None, dim: int | None = None, *, output_size: int | None = None
) -> Any:
    """Each row so many times; a different number for every row takes the fallback."""
    if repeats is None or dim is None or not isinstance(input, PatchTensor):  # no repeats: the input says how many
        return NotImplemented
    at = nth(dim, input.ndim)
    if at != input.row_layout.dim:
        if isinstance(repeats, PatchTensor):
            return NotImplemented
        repeats = replicated_operand(repeats, input) if isinstance(repeats, Tensor) else repeats
        return wrap(func(input.local, repeats, at, output_size=output_size), input)
    if not isinstance(repeats, int):
        return NotImplemented
    bounds = tuple(b * repeats for b in input.row_layout.bounds)
    return wrap(func(input.local, repeats, at), input, RowLayout(at, bounds))


@rule(*named("roll"), keeps_format=True)
def roll(func: Any, input: PatchTensor, shifts: Any, dims: Any = (), **kwargs: Any) -> Any:
    steps = tuple(shifts) if isinstance(shifts, (tuple, list)) else (shifts,)
    if dims is None or (isinstance(dims, (tuple, list)) and not dims):
        return NotImplemented
    along = normalize_dims(dims, input.ndim)
    others = [(step, d) for step, d in zip(steps, along, strict=True) if d != input.row_layout.dim]
    if others:
        input = wrap(func(input.local, *zip(*others)), input)
    size = input.row_layout.size
    shift = sum(step for step, d in zip(steps, along) if d == input.row_layout.dim) % max(size, 1)
    if not shift:
        return input if others else input.clone()
    return assembled(func, [input], [(0, size - shift, size), (0, 0, size - shift)], input.row_layout.bounds)


def _mirrors_beside(input: PatchTensor, *dims: Any, **kwargs: Any) -> bool:
    """Whether dims are given, and the rows' is not among them."""
    given = sizes_of(dims, kwargs, "dims") if dims or kwargs else ()
    return bool(given) and input.row_layout.dim not in [nth(d, input.ndim) for d in given]


@rule(*named("flip", "fliplr", "flipud"), any_order=_mirrors_beside)
def flip(func: Any, input: PatchTensor, *dims: Any, **kwargs: Any) -> Tensor:
    """Each rank keeps its place, and fetches the rows that come to it."""
    given = {"fliplr": (1,), "flipud": (0,)}.get(op_name(func)) or sizes_of(dims, kwargs, "dims")
    mirrored = [nth(d, input.ndim) for d in given]
    if input.row_layout.dim not in mirrored:
        return wrap(input.local.flip(mirrored), input)
    bounds = input.row_layout.bounds
    needs = tuple(((bounds[-1] - hi, bounds[-1] - lo),) for lo, hi in pairwise(bounds))
    return in_memory_of(fetch(input, needs, func)[0].flip(mirrored), input)
