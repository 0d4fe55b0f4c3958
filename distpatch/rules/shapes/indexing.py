"""``x[...]`` read and written: by numbers and slices a view, by lists and tensors a copy, by masks where they are."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from distpatch.layout.rows import RowLayout
from distpatch.rules.core.aliasing import is_basic
from distpatch.rules.core.fresh_buffers import shard_along, shard_like
from distpatch.rules.core.operands import local_operand, local_slice, replicated_operand
from distpatch.rules.core.registry import named, rule
from distpatch.rules.core.wrapping import wrap
from distpatch.rules.shapes.concatenation import assembled
from distpatch.rules.shapes.gather_scatter import rows_by_number
from distpatch.rules.shapes.slicing import slice_dim
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils.private import FakeTensor
from distpatch.torch_utils.tree import tensors_in

Items = list[Any]  # an index, one item for each dim of the tensor (and None for each new one)
WHOLE = slice(None)
_SHORT = 32


@dataclass(frozen=True)
class IndexPlan:
    """An index as items that speak of every dim of a tensor: numbers, slices, None, lists of numbers, tensors.

    ``row``: which of them speaks of the rows; None, where a mask speaks of them among others.
    """

    items: tuple[Any, ...]
    row: int | None

    @property
    def row_item(self) -> Any:
        return None if self.row is None else self.items[self.row]

    @property
    def is_supported(self) -> bool:
        """Whether each rank can follow it by itself: no item is sharded, or a truth value, which makes a new dim."""
        return self.row is not None and not any(
            isinstance(item, (PatchTensor, bool)) or (_is_mask(item) and item.ndim == 0) for item in self.items
        )

    @property
    def others(self) -> list[Any]:
        """The items that speak of other dims than the rows."""
        return [item for at, item in enumerate(self.items) if at != self.row]

    def with_row(self, item: Any) -> Items:
        """The items with another one for the rows."""
        return [item if at == self.row else other for at, other in enumerate(self.items)]


def _expand_index(index: Any, x: Tensor) -> Items:
    items = [_as_item(item, x) for item in as_tuple(index)]
    left = [WHOLE] * (x.ndim - sum(map(_dims_of, items)))
    dots = next((at for at, item in enumerate(items) if item is Ellipsis), len(items))
    return items[:dots] + left + items[dots + 1 :]


def _planned(items: Items, x: PatchTensor) -> IndexPlan:
    return IndexPlan(tuple(items), _item_of(items, x.row_layout.dim))


@rule(
    torch.Tensor.__getitem__,
    any_order=lambda input, index: not isinstance(input, PatchTensor) or _takes_runs(input, index),
    view=True,
)
def getitem(func: Any, input: Tensor, index: Any) -> Any:
    """Numbers and slices one dim after the other; lists and replicated tensors of numbers beside the rows."""
    if not isinstance(input, PatchTensor):
        return _looked_up(input, index)
    items = _expand_index(index, input)
    if all(map(is_basic, items)):
        return _basic(input, items)
    plan = _planned(items, input)
    if isinstance(plan.row_item, PatchTensor) and not _is_mask(plan.row_item):  # which rows, all ranks have to know
        plan = IndexPlan(tuple(plan.with_row(gather_replicated(plan.row_item))), plan.row)
    if not plan.is_supported:
        return NotImplemented
    row = plan.row_item
    if _is_mask(row):  # of rows: which they are has to be read anyway
        row = _places(row, input.row_layout.size)
    if isinstance(row, slice):
        x = slice_dim(input, input.row_layout.dim, row)
        assert isinstance(x, PatchTensor)
        items = plan.with_row(WHOLE)
        return wrap(x.local[tuple(items)], x, x.row_layout.with_dim(_row_dim_after(x, items)[0]))
    if isinstance(row, list) and all(map(_is_whole, plan.others)):
        return _chosen_rows(func, input, row)
    if isinstance(row, Tensor) and row.ndim and all(map(is_basic, plan.others)):
        x = _basic(input, plan.with_row(WHOLE))
        chosen = rows_by_number(x, row.flatten(), func)
        return chosen if row.ndim == 1 else chosen.unflatten(x.row_layout.dim, row.shape)
    assert plan.row is not None
    return _numbered_rows(func, input, plan.with_row(row), plan.row)


def _takes_runs(x: PatchTensor, index: Any) -> bool:
    """Whether rows are taken as they follow each other: all of them, a slice, one."""
    plan = _planned(_expand_index(index, x), x)
    row = plan.row_item
    return plan.is_supported and (isinstance(row, int) or (isinstance(row, slice) and row.step in {None, 1}))


def as_tuple(index: Any) -> tuple[Any, ...]:
    """As torch (and numpy, once) takes it: a short sequence that holds slices or sequences is a tuple."""
    if isinstance(index, tuple):
        return index
    sequence = isinstance(index, Sequence) or (not isinstance(index, Tensor) and getattr(index, "ndim", 0) > 0)
    if sequence and len(index) < _SHORT and any(map(_speaks_of_a_dim, index)):
        return tuple(index)
    return (index,)


def _speaks_of_a_dim(item: Any) -> bool:
    several = isinstance(item, (Tensor, Sequence, slice)) or getattr(item, "ndim", 0) > 0
    return several or item is None or item is Ellipsis


def _as_item(item: Any, x: Tensor) -> Any:
    if is_basic(item) or isinstance(item, bool):
        return _as_slice(item) if isinstance(item, slice) and item != WHOLE else item
    if isinstance(item, Tensor):
        return int(item) if _is_number(item) else item
    if isinstance(item, (list, tuple, range)) and all(type(i) is int for i in item):
        return list(item)
    tensor = torch.as_tensor(item)  # numpy's, lists of booleans, nested lists: the host has them
    return tensor.item() if tensor.ndim == 0 and tensor.dtype != torch.bool else tensor.to(x.device)


def _as_slice(item: slice) -> slice:
    """Bounds that are numpy's numbers, or tensors of one, are read, as torch reads them."""
    return slice(*(None if n is None else operator.index(n) for n in (item.start, item.stop, item.step)))


def _is_number(item: Tensor) -> bool:
    """Whether torch reads it, and takes it for a number."""
    whole_number = not (item.dtype.is_floating_point or item.dtype.is_complex or _is_mask(item))
    return item.ndim == 0 and whole_number and not torch.compiler.is_compiling() and not isinstance(item, FakeTensor)


def _is_mask(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype in {torch.bool, torch.uint8}


def _is_list_of_rows(item: Any) -> bool:
    return isinstance(item, list) or (type(item) is Tensor and item.ndim == 1)


def _is_whole(item: Any) -> bool:
    return isinstance(item, slice) and item == WHOLE


def _dims_of(item: Any) -> int:
    """How many dims of the tensor an item speaks of; a mask of several."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    return item.ndim if _is_mask(item) else 1


def _item_of(items: Items, dim: int) -> int | None:
    """Which item speaks of the dim, or None where a mask speaks of it among others."""
    seen = 0
    for at, item in enumerate(items):
        count = _dims_of(item)
        if seen <= dim < seen + count:
            return at if count == 1 else None
        seen += count
    raise IndexError(f"too many indices: {items}")


def _basic(x: Tensor, items: Sequence[Any]) -> Any:
    dim = 0
    for item in items:
        if isinstance(item, int):
            x = x.select(dim, item)
            continue
        x = x.unsqueeze(dim) if item is None else slice_dim(x, dim, item)
        dim += 1
    return x


def _row_dim_after(x: PatchTensor, items: Items) -> tuple[int, int]:
    """Where the rows stand in ``x[items]``, which takes all of them, and its dims: of a tensor without data."""
    lengths = [len(item) for item in items if isinstance(item, list)]
    lengths += [item.numel() for item in items if isinstance(item, Tensor)]
    marked = 1 + max([*x.shape, *lengths])
    probe = torch.empty([marked if d == x.row_layout.dim else n for d, n in enumerate(x.shape)], device="meta")
    stand_ins: Items = []
    for item in items:
        if isinstance(item, list):
            stand_ins.append(torch.empty(len(item), dtype=torch.long, device="meta"))
        elif _is_mask(item):
            stand_ins += [torch.empty(1, dtype=torch.long, device="meta")] * item.ndim
        elif isinstance(item, Tensor):  # of no dims: a number
            stand_ins.append(torch.empty_like(item, device="meta") if item.ndim else 0)
        else:
            stand_ins.append(item)
    shape = list(probe[tuple(stand_ins)].shape)
    return shape.index(marked), len(shape)


def _chosen_rows(func: Any, x: PatchTensor, numbers: Sequence[int]) -> PatchTensor:
    """Rows by number: every rank knows the numbers, so it knows who has them."""
    size = x.row_layout.size
    if any(not -size <= i < size for i in numbers):
        raise IndexError(f"index {numbers} is out of bounds for dimension {x.row_layout.dim} with size {size}")
    runs = groupby(enumerate(i % size for i in numbers), key=lambda pair: pair[1] - pair[0])
    rows = [[row for _, row in run] for _, run in runs]
    return assembled(func, [x], [(0, run[0], run[-1] + 1) for run in rows])


def _places(mask: Tensor, size: int) -> Tensor:
    if len(mask) != size:
        raise IndexError(f"a mask of {len(mask)} rows does not fit {size}")
    return mask.nonzero().flatten()


def _numbered_rows(func: Any, x: PatchTensor, items: Items, row: int) -> Any:
    """Rows by a replicated tensor of numbers, beside others that are broadcast with it."""
    numbers = torch.as_tensor(items[row], device=x.device)
    chosen = {at: torch.as_tensor(i, device=x.device) for at, i in enumerate(items) if isinstance(i, (list, Tensor))}
    shapes = [i.shape for i in chosen.values()]
    free = [d for d in range(-numbers.ndim, 0) if all(len(shape) < -d or shape[d] == 1 for shape in shapes)]
    along = [d for d in range(-numbers.ndim, 0) if numbers.shape[d] != 1] or free  # the dim that says which row
    if (len(along) != 1 and not along == free != []) or any(map(_is_mask, items)) or any(type(i) is int for i in items):
        return NotImplemented
    back = along[0]
    x = rows_by_number(x, numbers.flatten(), func)
    own = {
        at: local_slice(i, x, back) if i.ndim >= -back and i.shape[back] == x.row_layout.size else i
        for at, i in chosen.items()
    }
    shape = [-1 if d == numbers.ndim + back else 1 for d in range(numbers.ndim)]
    own[row] = torch.arange(x.local.shape[x.row_layout.dim], device=x.device).view(shape)
    marked = [own.get(at, item) for at, item in enumerate(items)]
    dim = _chosen_dim(x, marked, back)
    return wrap(x.local[tuple(marked)], x, x.row_layout.with_dim(dim))


def _chosen_dim(x: PatchTensor, items: Items, back: int) -> int:
    """Which dim of ``x[items]`` the dim ``back``, counted from behind, of the broadcast tensors is."""
    tensors = [at for at, item in enumerate(items) if isinstance(item, Tensor)]
    ndim = max(items[at].ndim for at in tensors)
    together = tensors[-1] - tensors[0] + 1 == len(tensors)
    first = tensors[0] if together else 0  # numpy's: apart from each other, in front of all
    return first + ndim + back


def _looked_up(table: Tensor, index: Any) -> Any:
    """A replicated table at sharded numbers: each rank looks up its own."""
    items = _expand_index(index, table)
    at = next((at for at, item in enumerate(items) if isinstance(item, PatchTensor)), 0)
    lead = items[at]
    if _is_mask(lead) or not all(map(_is_whole, [*items[:at], *items[at + 1 :]])):
        return NotImplemented
    items[at] = lead.local
    return wrap(replicated_operand(table, lead)[tuple(items)], lead, lead.row_layout.with_dim(at + lead.row_layout.dim))


@rule(
    torch.Tensor.__setitem__,
    any_order=lambda input, index, value: isinstance(input, PatchTensor) and _takes_runs(input, index),
)
def setitem(func: Any, input: Tensor, index: Any, value: Any) -> Any:
    """Written to the rows where they are: every rank keeps its own of the value; a replicated tensor takes all."""
    if not isinstance(input, PatchTensor):
        _shard_in_place(input, _expand_index(index, input), value)
    if not isinstance(input, PatchTensor):
        if any(isinstance(t, PatchTensor) for t in tensors_in(index)):
            return NotImplemented
        input[index] = gather_replicated(value)
        return None
    plan = _planned(_expand_index(index, input), input)
    if all(map(is_basic, plan.items)):
        return _set_basic(input, plan, value)
    mask = plan.items[0]
    if _is_mask(mask) and all(map(_is_whole, plan.items[1:])):
        return _set_masked(input, mask.bool(), value)
    return _set_chosen(func, input, plan, value)


def _shard_in_place(target: Tensor, items: Sequence[Any], value: Any) -> None:
    """Make a plain tensor that rows are written to, or chosen in by a sharded mask, a sharded one."""
    if items and isinstance(items[0], PatchTensor) and _is_mask(items[0]) and all(map(_is_whole, items[1:])):
        shard_like(target, items[0], items[0].row_layout.dim)
    chosen = [item for item in items if not is_basic(item)]  # rows by their numbers, or by a mask
    if not isinstance(value, PatchTensor) or any(item is None for item in items) or len(chosen) > 1:
        return
    if chosen and not (_is_list_of_rows(chosen[0]) and all(item is chosen[0] or _is_whole(item) for item in items)):
        return
    kept = [dim for dim, item in enumerate(items) if not isinstance(item, int)]
    back = value.row_layout.dim - value.ndim
    if -back > len(kept):
        return
    dim = kept[back]
    rows = target.shape[dim]
    if not isinstance(items[dim], slice) or len(range(rows)[items[dim]]) == value.row_layout.size:
        bounds = value.row_layout.bounds if value.row_layout.size == rows else value.region.bounds(rows)
        shard_along(target, value, RowLayout(dim, bounds))


def _set_basic(x: PatchTensor, plan: IndexPlan, value: Any) -> None:
    """One row is written as a slice of one row, since its owner alone has it."""
    number = plan.row_item
    if isinstance(number, int):
        if not -x.row_layout.size <= number < x.row_layout.size:
            raise IndexError(
                f"index {number} is out of bounds for dimension {x.row_layout.dim} of {x.row_layout.size} rows"
            )
        number %= x.row_layout.size
    one_row = isinstance(number, int)
    target = _basic(x, plan.with_row(slice(number, number + 1) if one_row else number))
    if not isinstance(value, Tensor):
        target.fill_(value)
        return
    while value.ndim > target.ndim - one_row and value.shape[0] == 1:
        value = value.squeeze(0)
    behind = target.ndim - 1 - target.row_layout.dim  # dims behind the rows
    if one_row and value.ndim > behind:
        value = value.unsqueeze(value.ndim - behind)
    if (
        isinstance(value, PatchTensor)
        and isinstance(value.local, PatchTensor)
        and not isinstance(target.local, PatchTensor)
    ):
        value = wrap(gather_replicated(value.local), value)  # what the target holds on all ranks of an inner axis
    target.copy_(value)


def _set_chosen(func: Any, x: PatchTensor, plan: IndexPlan, value: Any) -> Any:
    """With lists or replicated tensors of numbers: beside the rows, or of rows alone."""
    row = plan.row
    if row is None or not plan.is_supported:
        return NotImplemented
    if isinstance(plan.row_item, slice):
        target = slice_dim(x, x.row_layout.dim, plan.row_item)
        assert isinstance(target, PatchTensor)
        items = plan.with_row(WHOLE)
        dim, ndim = _row_dim_after(target, items)
        if isinstance(value, Tensor):
            value = local_operand(value, target, dim - ndim, func)
        target.local[tuple(items)] = value
    elif all(map(_is_whole, plan.others)):
        chosen = plan.row_item
        numbers = _places(chosen, x.shape[row]) if _is_mask(chosen) else torch.as_tensor(chosen, device=x.device)
        shape = (*x.shape[:row], *numbers.shape, *x.shape[row + 1 :])
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=x.dtype, device=x.device)
        value = value.to(x.dtype).expand(shape).flatten(row, row + numbers.ndim - 1)
        x.index_copy_(row, numbers.flatten() % x.row_layout.size, value)
    else:
        return NotImplemented
    return None


@rule(*named("index_put", "index_put_"))
def index_put(func: Any, input: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Any:
    if accumulate or not isinstance(input, PatchTensor) or any(isinstance(index, PatchTensor) for index in indices):
        return NotImplemented
    target = input if func.__name__.endswith("_") else input.clone()
    target[tuple(WHOLE if index is None else index for index in indices)] = values
    return target


def _set_masked(x: PatchTensor, mask: Tensor, value: Any) -> None:
    """``x[mask] = value``, where the mask speaks of the first dims."""
    rest = x.ndim - mask.ndim
    wide = mask.reshape(*mask.shape, *[1] * rest)
    if not isinstance(value, Tensor) or value.numel() == 1:
        value = value.reshape(()).to(x.dtype) if isinstance(value, Tensor) else value
        x.masked_fill_(wide, value)
    elif value.ndim <= rest or value.shape[0] == 1:
        x.copy_(torch.where(wide, value[0] if value.ndim > rest else value, x))
    else:
        x.local.copy_(masked_rows(x, gather_replicated(mask), gather_replicated(value)))


def masked_rows(x: PatchTensor, mask: Tensor, values: Tensor) -> Tensor:
    """This rank's rows with the replicated ``values``, (number of places, ...), where the mask is, in order."""
    dim, number = x.row_layout.dim, mask.flatten().cumsum(0).view(mask.shape) - 1
    values = replicated_operand(values, x)
    if mask.ndim > dim:
        mask, number = local_slice(mask, x, dim), local_slice(number, x, dim)
    else:
        values = local_slice(values, x, 1 + dim - mask.ndim)
    filler = values.new_zeros(1, *values.shape[1:])
    chosen = torch.cat([values, filler])[number.clamp(min=0)].to(x.dtype)
    return torch.where(mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim)), chosen, x.local)


@rule(*named("masked_scatter", "masked_scatter_"))
def masked_scatter(func: Any, input: PatchTensor, mask: Tensor, source: Tensor) -> Any:
    if not isinstance(input, PatchTensor) or torch.broadcast_shapes(input.shape, mask.shape) != input.shape:
        return NotImplemented
    local = masked_rows(input, gather_replicated(mask).expand(input.shape), gather_replicated(source).flatten())
    if not func.__name__.endswith("_"):
        return wrap(local, input)
    input.local.copy_(local)
    return input
