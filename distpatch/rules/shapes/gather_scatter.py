"""Functions with an index tensor: beside the rows locally; along them each rank serves the rows that it owns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.comm.collectives import narrow_rows
from distpatch.layout.rows import EMPTY, Needs, RowLayout
from distpatch.rules.core.fresh_buffers import shard_along, shard_like
from distpatch.rules.core.operands import local_rows_of, replicated_operand, whole_operand
from distpatch.rules.core.redistribution import fetch, held_places, redistribute
from distpatch.rules.core.registry import named, nth, rule, written
from distpatch.rules.core.wrapping import beside_rows, wrap
from distpatch.rules.reductions.extrema import picked
from distpatch.rules.shapes.slicing import slice_dim
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.private import FakeTensor


def _along_rows(input: Any, dim: int, *_: Any, **__: Any) -> bool:
    """Whether it is along the rows of a sharded tensor: then each rank writes its own, in whichever order."""
    return isinstance(input, PatchTensor) and nth(dim, input.ndim) == input.row_layout.dim


@rule(*named("index_select"), asks_if_empty=True)
def index_select(func: Any, input: PatchTensor, dim: int, index: Tensor) -> Any:
    if isinstance(index, PatchTensor) or not isinstance(input, PatchTensor):
        return NotImplemented
    if nth(dim, input.ndim) == input.row_layout.dim:
        return rows_by_number(input, index.flatten(), func)
    return wrap(func(input.local, dim, index), input)


def _by_known_numbers(input: Any, dim: int, index: Any, **_: Any) -> bool:
    """Whether rows are chosen by numbers that all ranks have: each serves its own, in whichever order."""
    return _along_rows(input, dim) and not isinstance(index, PatchTensor)


@rule(*named("gather"), any_order=_by_known_numbers)
def gather(func: Any, input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    """The index may have fewer rows than the input: it is then taken from the first of them."""
    at = nth(dim, input.ndim)
    row = next(t for t in (input, index) if isinstance(t, PatchTensor)).row_layout.dim
    if isinstance(index, PatchTensor) and index.row_layout.dim != row:
        index = redistribute(index, RowLayout(row, index.region.bounds(index.shape[row])), func)
    if at == row:
        if not isinstance(input, PatchTensor):
            assert isinstance(index, PatchTensor)
            return wrap(func(replicated_operand(input, index), at, index.local), index)
        if not isinstance(index, PatchTensor):
            return picked(input, index, func)
        if input.row_layout.size:
            layout = input.row_layout.with_bounds(input.region.bounds(index.shape[row]))
            own = redistribute(index, layout, func).local
            return wrap(shown_in_turn(input, own, lambda rows, number: func(rows, at, number), func), input, layout)
    if at == row or index.shape[row] > input.shape[row]:
        return NotImplemented
    input = slice_dim(input, row, slice(0, index.shape[row]))
    lead = index if isinstance(index, PatchTensor) else input
    assert isinstance(lead, PatchTensor)
    back = row - lead.ndim
    return wrap(func(local_rows_of(input, lead, back, func), at, local_rows_of(index, lead, back, func)), lead)


@rule(
    *named("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"),
    any_order=_along_rows,
)
def scatter(func: Any, input: Tensor, dim: int, index: Tensor, src: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Rows stay where an index as tall as the input says what goes where in another dim.

    Along the rows the index and the values are needed whole.
    """
    value = kwargs.pop("value", src)
    at = nth(dim, input.ndim)
    if not isinstance(input, PatchTensor):
        input = _sharded_as(func, input, at, index, value)
    if not isinstance(input, PatchTensor):
        return NotImplemented
    row = input.row_layout.dim
    if at == row:
        value = whole_operand(value, input, func) if isinstance(value, Tensor) and value.ndim else value
        return _written_rows(func, input, gather_replicated(index), value, *args, **kwargs)
    if index.shape[row] != input.shape[row]:
        return NotImplemented
    back = row - input.ndim
    if isinstance(value, Tensor) and value.ndim:
        value = local_rows_of(slice_dim(value, row, slice(0, index.shape[row])), input, back, func)
    result = func(input.local, at, local_rows_of(index, input, back, func), value, *args, **kwargs)
    return written(input) if result is input.local else wrap(result, input)


def _written_rows(func: Any, x: PatchTensor, index: Tensor, value: Any, *args: Any, **kwargs: Any) -> PatchTensor:
    """What a function that writes along the rows makes of them; ``index`` and ``value`` are whole.

    A rank writes what belongs to others to one more row, which is dropped: no number is read on the host. A number that
    is out of range stays so, and is refused as on one device.
    """
    at, layout = x.row_layout.dim, x.row_layout
    count = layout.height(x.rank)
    own = held_places(x, index, count)
    own = torch.where(index >= layout.size, index - layout.size + count + 1, torch.where(index < 0, index, own))
    sink = x.local.new_zeros([1 if d == at else n for d, n in enumerate(x.local.shape)])
    out_of_place = getattr(torch, op_name(func).rstrip("_"))
    local = out_of_place(torch.cat([x.local, sink], at), at, own, value, *args, **kwargs).narrow(at, 0, count)
    if not op_name(func).endswith("_"):
        return wrap(local, x)
    x.local.copy_(local)
    return x


def _sharded_as(func: Any, input: Tensor, at: int, *others: Any) -> Tensor:
    """A plain tensor that sharded ones are written to beside their rows, sharded as they are: its rows are enough."""
    lead = next((t for t in others if isinstance(t, PatchTensor)), None)
    if (
        lead is None
        or lead.ndim != input.ndim
        or lead.row_layout.dim == at
        or lead.row_layout.size != input.shape[lead.row_layout.dim]
    ):
        return input
    if op_name(func).endswith("_"):
        shard_like(input, lead)  # in place, where it can be
        return input
    return wrap(local_rows_of(input, lead, lead.row_layout.dim - lead.ndim, func), lead)


@rule(
    *named("index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_"),
    any_order=_along_rows,
)
def index_write(
    func: Any, input: Tensor, dim: int, index: Tensor, source: Any = None, *, alpha: Any = 1, **kwargs: Any
) -> Any:
    """``source`` goes to the places of ``index`` along a dim; along the rows each rank takes what is its own."""
    source = kwargs.pop("value", source)
    options = {"alpha": alpha} if op_name(func).startswith("index_add") and alpha != 1 else {}
    if not isinstance(input, PatchTensor) and input.ndim:
        input = _in_rows_of(func, input, nth(dim, input.ndim), source)
    if not isinstance(input, PatchTensor) or isinstance(index, PatchTensor) or kwargs:
        return NotImplemented
    at = nth(dim, input.ndim)
    if at == input.row_layout.dim:
        source = whole_operand(source, input, func) if isinstance(source, Tensor) else source
        index = torch.where(index < 0, index + input.row_layout.size, index)
        return _written_rows(func, input, index, source, **options)
    if isinstance(source, Tensor):
        back = input.row_layout.dim - input.ndim
        source = local_rows_of(source, input, back, func) if source.ndim else replicated_operand(source, input)
    local = getattr(torch, op_name(func).rstrip("_"))(input.local, at, index, source, **options)
    if not op_name(func).endswith("_"):
        return wrap(local, input)
    input.local.copy_(local)
    return input


def _in_rows_of(func: Any, input: Tensor, at: int, source: Any) -> Tensor:
    """A plain tensor that sharded rows are written to, sharded too: beside the rows as they are, along them evenly."""
    if not isinstance(source, PatchTensor) or source.ndim != input.ndim or source.row_layout.dim != at:
        return _sharded_as(func, input, at, source)
    layout = RowLayout(at, source.region.bounds(input.shape[at]))
    if op_name(func).endswith("_"):
        shard_along(input, source, layout)  # in place, where it can be
        return input
    return wrap(narrow_rows(replicated_operand(input, source), layout, source.rank), source, layout)


@rule(F.embedding, any_order=True)
def embedding(
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """A replicated table at sharded numbers. What counts the numbers, or writes to the table, needs all."""
    if isinstance(weight, PatchTensor) or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    assert isinstance(input, PatchTensor)
    table = replicated_operand(weight, input)
    return beside_rows(func, input, table, padding_idx)


@rule(F.one_hot)
def one_hot(func: Any, input: PatchTensor, num_classes: int = -1) -> Any:
    if num_classes < 0 and input.numel():  # as many as the largest number says
        num_classes = int(input.max()) + 1
    return wrap(func(input.local, num_classes), input)


# Rows chosen by a replicated tensor of numbers, along the sharded dim.


def rows_by_number(x: PatchTensor, numbers: Tensor, func: Any) -> PatchTensor:
    """``x.index_select(dim, numbers)`` along the sharded dim; ``numbers``: (n,), the same on every rank.

    Numbers that the host has say which rows a rank needs: one exchange. Those that only the device has are not
    read: each rank's rows are shown to all, one rank after the other. Raises ``IndexError`` as torch does.
    """
    dim, size, rank = x.row_layout.dim, x.row_layout.size, x.rank
    layout = x.row_layout if len(numbers) == size else RowLayout(dim, x.region.bounds(len(numbers)))
    lo, hi = layout.interval(rank)
    if not _readable(numbers):
        own = torch.where(numbers < 0, numbers + size, numbers)[lo:hi]
        return wrap(shown_in_turn(x, own, lambda rows, at: rows.index_select(dim, at), func), x, layout)
    known = numbers.tolist()
    if any(not -size <= n < size for n in known):
        raise IndexError(f"{op_name(func)}: index {known} is out of bounds for dimension {dim} with size {size}")
    needs = _intervals([n % size for n in known], layout.bounds)
    rows = fetch(x, needs, func)[0]
    return wrap(rows.index_select(dim, numbers[lo:hi].long() % max(size, 1) - needs[rank][0][0]), x, layout)


def _readable(numbers: Tensor) -> bool:
    """Whether the host can read them without waiting for a device; a compiler has none."""
    return numbers.device.type == "cpu" and not (isinstance(numbers, FakeTensor) or torch.compiler.is_compiling())


def _intervals(numbers: Sequence[int], bounds: Sequence[int]) -> Needs:
    """For every rank the rows from the first to the last that it needs."""
    own = (numbers[lo:hi] for lo, hi in pairwise(bounds))
    return tuple(((min(some), max(some) + 1) if some else EMPTY,) for some in own)


def shown_in_turn(x: PatchTensor, numbers: Tensor, pick: Callable[[Tensor, Tensor], Tensor], func: Any) -> Tensor:
    """``pick(rows, numbers)`` where only the device knows the numbers: each rank's rows are shown to all in turn.

    A number out of range stays as it is, so that torch refuses it as it does on one device.
    """
    dim, world, size = x.row_layout.dim, x.row_layout.world_size, x.row_layout.size
    elsewhere = torch.where((numbers >= 0) & (numbers < size), 0, numbers)
    shape = numbers.shape if numbers.ndim == x.ndim else [len(numbers) if d == dim else 1 for d in range(x.ndim)]
    found: Tensor | None = None
    for lo, hi in pairwise(x.row_layout.bounds):
        if lo < hi:
            rows = fetch(x, (((lo, hi),),) * world, func)[0]
            here = (numbers >= lo) & (numbers < hi)
            part = pick(rows, torch.where(here, numbers - lo, elsewhere))
            found = part if found is None else torch.where(here.view(shape), part, found)
    return pick(x.local, numbers) if found is None else found
