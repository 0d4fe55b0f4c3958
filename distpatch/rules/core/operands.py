"""Operands of a rule: wrapped, replicated, brought to the same rows, put in another layout."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distpatch.comm import collectives
from distpatch.comm.dtensors import is_dtensor, refusal
from distpatch.comm.row_exchange import fetch_rows
from distpatch.errors import LayoutError, UnsupportedOpError
from distpatch.layout.rows import EMPTY, BlockLayout, Needs, RowLayout
from distpatch.layout.transfers import needs_in_order
from distpatch.lazy.recipe import Recipe
from distpatch.lazy.row_patches import none_of, same_memory, with_dummy_row
from distpatch.rules.core.gather_records import record
from distpatch.rules.core.registry import nth
from distpatch.tensor.axes import InnerTensor, bare
from distpatch.tensor.patch_tensor import BlockTensor, PatchCopy, PatchTensor, gather_replicated, shard_in
from distpatch.torch_utils import memory_format
from distpatch.torch_utils.memory_format import Order
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors


def kept(x: PatchTensor, local: Any, dims: Sequence[int], keepdim: bool) -> Any:
    """The sharded dim stays; it moves forward by the dims that go before it."""
    gone = 0 if keepdim else sum(d < x.row_layout.dim for d in dims)
    layout = x.row_layout.with_dim(x.row_layout.dim - gone)
    return map_tensors(lambda t: wrap(t, x, layout), local)


def precise(dtype: torch.dtype) -> torch.dtype:
    """In what partial results are kept: fp32 for half precision."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def autocast(x: PatchTensor, probe: Callable[[Tensor], Tensor]) -> PatchTensor:
    """The tensor in the dtype that autocast runs this function in, found by trying one element."""
    rows = x.local_or_recipe
    if not torch.is_autocast_enabled(rows.device.type) or not rows.dtype.is_floating_point:
        return x
    return wrap(x.local.to(probe(x.local.new_zeros(1)).dtype), x)


MOST_PIECES = 1024  # more intervals of rows a rank than this are not worth an exchange of their own
PLAIN = (Tensor, torch.nn.Parameter)


def wrap(local: Tensor | Recipe, like: PatchTensor, layout: RowLayout | None = None) -> PatchTensor:
    """A PatchTensor of the same region; of the same layout where none is given."""
    result = PatchTensor(local, layout or like.row_layout, like.region)
    if like.row_stride and isinstance(local, Tensor) and shares_memory(local, like.local):
        result.row_stride = like.row_stride
    return result


def shares_memory(local: Tensor, other: Tensor) -> bool:
    """Whether it sees what is written to the other."""
    return torch.compiler.is_compiling() or same_memory(local, other)


def replicated_operand(tensor: Tensor, like: PatchTensor) -> Tensor:
    """A replicated tensor (or all of a sharded one) as an operand of rows: identity, all-reduce of the gradient."""
    tensor = gather_replicated(tensor)
    if type(tensor) not in PLAIN and is_dtensor(tensor):
        raise UnsupportedOpError(refusal(tensor))
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    known = like.region.call.replicas.get(id(tensor))
    if known is not None and known[0] is tensor:
        return known[1]
    return collectives.replicated_operand(tensor, like.comm.name)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def sum_ranks(partial: Tensor, like: PatchTensor, func: Any) -> Tensor:
    return collectives.sum_partials(partial, like.comm.name, op_name(func))


def fetch(x: PatchTensor, needs: Needs, func: Any) -> list[Tensor]:
    """The intervals of global rows that each rank needs; gradients return and are added."""
    if isinstance(x.row_layout, BlockLayout) and x.region.level:
        return [_inner_whole(x, func).narrow(x.row_layout.dim, lo, hi - lo) for lo, hi in needs[x.rank]]
    if type(x) is not PatchTensor:
        x = in_order(x)
    rows, name = x.row_layout, x.comm.name
    return fetch_rows(x.local, rows.dim, rows.bounds, needs, name, op_name(func), False)


def unmerge_blocks(x: PatchTensor) -> PatchTensor:
    """A ``BlockTensor`` with the dim of its blocks in front of its rows again, a view; others as they are."""
    layout = x.row_layout
    if not isinstance(layout, BlockLayout):
        return x
    lo, hi = layout.inner[x.rank : x.rank + 2]
    sizes = (layout.blocks, hi - lo)
    return wrap(x.local.unflatten(layout.dim, sizes), x, layout.opened)


def in_order(tensor: Any) -> Any:
    """A ``BlockTensor`` with its rows in order; any other tensor as it is.

    Those of an inner axis are gathered: what is merged with them may be the rows of the axis outside it, so that its
    ranks, which have other numbers of these, would share them out in other ways.
    """
    if isinstance(tensor, PatchCopy):
        tensor = tensor.plain
    if not isinstance(tensor, BlockTensor):
        return tensor
    layout, comm = tensor.row_layout, tensor.comm
    if tensor.region.level:
        record("reshape", [tensor])
        return gather_replicated(tensor)
    bounds = tensor.region.bounds(layout.size)
    needs = needs_in_order(layout.inner, layout.blocks, bounds)
    if len(needs[0]) > MOST_PIECES:
        record("reshape", [tensor])
        return reshard(tensor, gather_replicated(tensor), layout.dim)
    held = tuple(b * layout.blocks for b in layout.inner)
    pieces = fetch_rows(tensor.local, layout.dim, held, needs, comm.name, "reshape", False)
    return PatchTensor(torch.cat(pieces, layout.dim), RowLayout(layout.dim, bounds), tensor.region)


def _inner_whole(x: PatchTensor, func: Any) -> Tensor:
    """Blocks of an inner axis, which are gathered where they must be in order (``in_order``)."""
    record("reshape", [x])
    return gather_partial(x, func)


def gather_partial(x: PatchTensor, func: Any) -> Tensor:
    """All rows in order, as an operand of this rank's rows: gradients are partial, and are summed at the owners."""
    if isinstance(x.row_layout, BlockLayout):
        return gather_partial(unmerge_blocks(x), func).flatten(x.row_layout.dim, x.row_layout.dim + 1)
    return fetch(x, (((0, x.row_layout.size),),) * x.row_layout.world_size, func)[0]


def whole_operand(tensor: Tensor, like: PatchTensor, func: Any) -> Tensor:
    """All of an operand that this rank's rows are combined with; its gradient is summed over ranks."""
    return gather_partial(tensor, func) if isinstance(tensor, PatchTensor) else replicated_operand(tensor, like)


def crop(x: PatchTensor, lo: int, hi: int) -> PatchTensor:
    """Rows [lo, hi) of the whole tensor, a view: each rank keeps those of its own."""
    rows, rank = x.row_layout, x.rank
    bounds = tuple(min(max(b, lo), hi) - lo for b in rows.bounds)
    start = min(max(lo - rows.bounds[rank], 0), x.local.shape[rows.dim])
    local = x.local.narrow(rows.dim, start, bounds[rank + 1] - bounds[rank])
    return part_of(x, local, RowLayout(rows.dim, bounds))


def part_of(x: PatchTensor, local: Tensor, layout: RowLayout, step: int = 1) -> PatchTensor:
    """A view of some of the rows, every ``step``-th one."""
    result = wrap(local, x, layout)
    if layout.size != x.row_layout.size and not torch.compiler.is_compiling():
        result.row_stride = max(x.row_stride, 1) * step
    return result


def dim_order(x: PatchTensor) -> Order:
    """The order of its dims in memory, innermost first; without materialising deferred rows."""
    if x.strides is not None:
        return memory_format.order_by(x.shape, x.strides)
    return memory_format.order_in(x.recipe.format, x.ndim) if x.is_deferred else memory_format.memory_order(x.local)


def redistribute(x: PatchTensor, layout: RowLayout, func: Any) -> PatchTensor:
    """The same tensor in other rows, or sharded along another dim; one exchange either way."""
    held = x.row_layout
    if layout == held:
        return x
    blocks = held.blocks if isinstance(held, BlockLayout) else 0
    if isinstance(layout, BlockLayout) and (held.dim, blocks) == (layout.dim, layout.blocks):  # others of each block
        moved = redistribute(unmerge_blocks(x), layout.opened, func)
        return in_memory_of(moved.local.flatten(layout.dim, layout.dim + 1), x, layout)
    if isinstance(held, BlockLayout) and x.region.level:
        return in_memory_of(collectives.narrow_rows(_inner_whole(x, func), layout, x.rank), x, layout)
    x = in_order(x)
    if layout.dim != x.row_layout.dim:
        opened = RowLayout(layout.dim, x.region.bounds(layout.size))
        return (
            _turn(x, layout, func) if type(layout) is RowLayout else redistribute(_turn(x, opened, func), layout, func)
        )
    if isinstance(layout, BlockLayout):
        return in_memory_of(_in_blocks(x, layout, func), x, layout)
    needs = tuple((layout.interval(rank),) for rank in range(layout.world_size))
    return in_memory_of(fetch(x, needs, func)[0], x, layout)


def widest_beside(x: PatchTensor, along: Collection[int]) -> int | None:
    """The widest dim that is none of these, and is not sharded over an inner axis: one to turn to. None if all are."""
    taken, inside = {*along}, x.local
    while isinstance(inside, PatchTensor):
        taken.add(inside.row_layout.dim)
        inside = inside.local
    return max((dim for dim in range(x.ndim) if dim not in taken), key=lambda dim: x.shape[dim], default=None)


def turned(x: PatchTensor, dim: int, func: Any) -> PatchTensor:
    """Sharded evenly along another dim: every rank sends every other its slice of it."""
    return redistribute(x, RowLayout(dim, x.region.bounds(x.shape[dim])), func)


def alike_inside(tensors: Sequence[Tensor], func: Any) -> list[Tensor]:
    """Tensors of which each rank will have other rows: where these are sharded over inner axes, all in one way."""
    inside = [t.local if isinstance(t, PatchTensor) else bare(t) for t in tensors]
    lead = next((rows for rows in inside if isinstance(rows, PatchTensor)), None)
    if lead is None:
        return list(tensors)
    rows = lead.row_layout
    moved = [
        redistribute(t, rows, func) if isinstance(t, PatchTensor) and t.shape[rows.dim] == rows.size else t
        for t in inside
    ]
    moved = alike_inside(moved, func)
    return [
        t if new is old else wrap(new, t) if isinstance(t, PatchTensor) else InnerTensor(new)  # type: ignore[arg-type]
        for t, old, new in zip(tensors, inside, moved)
    ]


def _in_blocks(x: PatchTensor, layout: BlockLayout, func: Any) -> Tensor:
    """This rank's rows of each block."""
    rows = layout.inner[-1]
    if layout.blocks > MOST_PIECES:
        return collectives.narrow_rows(gather_partial(x, func), layout, x.rank)
    needs = tuple(
        tuple((block * rows + lo, block * rows + hi) if lo < hi else EMPTY for block in range(layout.blocks))
        for lo, hi in pairwise(layout.inner)
    )
    return torch.cat(fetch(x, needs, func), layout.dim)


def in_memory_of(local: Tensor, x: PatchTensor, layout: RowLayout | None = None) -> PatchTensor:
    """Rows that came from elsewhere, in memory as those of ``x``."""
    result = wrap(memory_format.in_memory_order(local, dim_order(x)), x, layout)
    if result.row_layout.is_tiny and not torch.compiler.is_compiling():
        result.strides = x.stride()
    return result


def _turn(x: PatchTensor, layout: RowLayout, func: Any) -> PatchTensor:
    """Every rank sends every other its slice of the new dim, in its own rows of the old one."""
    old, new, name = x.row_layout.dim, layout.dim, x.comm.name
    heights = [hi - lo for lo, hi in pairwise(x.row_layout.bounds)]
    held = tuple(layout.size * b for b in x.row_layout.bounds)
    needs = tuple(
        tuple((first + lo * height, first + hi * height) for first, height in zip(held, heights))
        for lo, hi in pairwise(layout.bounds)
    )
    wire = x.local.movedim((new, old), (0, 1)).flatten(0, 1)
    pieces = fetch_rows(wire, 0, held, needs, name, op_name(func), False)
    lo, hi = layout.interval(x.rank)
    parts = [piece.reshape(hi - lo, height, *wire.shape[1:]) for piece, height in zip(pieces, heights)]
    local = torch.cat(parts, 1).movedim((0, 1), (new, old))
    return in_memory_of(local, x, layout)


def along_rows(x: PatchTensor, func: Any) -> PatchTensor:
    """Where it is sharded along its channels (a reshape has made them of rows): along rows again, if it has any."""
    if x.row_layout.dim != 1 or x.ndim < 3:
        return x
    dim = max(2, x.ndim - 2)
    return redistribute(x, RowLayout(dim, x.region.bounds(x.shape[dim])), func)


def local_operand(tensor: Tensor, lead: PatchTensor, dim: int, func: Any) -> Tensor:
    """This rank's rows of an operand whose dim ``dim`` (counted from the back) meets the lead's rows.

    As ``local_rows_of``, except that an operand of height 1, or without that dim, is used as it is (gathered first
    where it is sharded), since it will be broadcast.
    """
    if tensor.ndim >= -dim and tensor.shape[dim] != 1:
        return local_rows_of(tensor, lead, dim, func)
    if isinstance(tensor, PatchTensor) and tensor.ndim >= -dim and lead.row_layout.size == 1:
        return local_rows_of(tensor, lead, dim, func)
    return replicated_operand(gather_replicated(tensor), lead)


def check_group(tensor: PatchTensor, lead: PatchTensor, func: Any) -> None:
    """Two tensors that meet are sharded over the same ranks."""
    if tensor.region is not lead.region and tensor.comm is not lead.comm:
        raise LayoutError(
            f"{op_name(func)}: {tensor!r} and {lead!r} are sharded over different groups. Gather one of them "
            "(distpatch.gather) and shard it over the other's group."
        )


def local_rows_of(tensor: Tensor, lead: PatchTensor, dim: int, func: Any) -> Tensor:
    """This rank's rows of an operand as tall as the lead: sliced where it is plain, else redistributed."""
    if tensor.ndim < -dim or tensor.shape[dim] != lead.row_layout.size:
        raise RuntimeError(
            f"{op_name(func)}: sizes of tensors must match, got {tuple(tensor.shape)} beside {tuple(lead.shape)}"
        )
    if isinstance(tensor, PatchTensor):
        check_group(tensor, lead, func)
        return redistribute(tensor, lead.row_layout.with_dim(tensor.ndim + dim), func).local
    return local_slice(replicated_operand(tensor, lead), lead, dim)


def local_slice(tensor: Tensor, x: PatchTensor, dim: int) -> Tensor:
    """This rank's rows of a plain tensor that has the rows of ``x`` along ``dim``, a view."""
    return collectives.narrow_rows(tensor, x.row_layout.with_dim(dim % tensor.ndim), x.rank)


def reshard(region_of: PatchTensor, tensor: Tensor, dim: int) -> PatchTensor:
    """A replicated tensor, sharded along ``dim``: a slice."""
    layout = RowLayout(dim, region_of.region.bounds(tensor.shape[dim]))
    return shard_in(region_of.region, tensor, layout)


def on_some_rows(
    fn: Callable[[Tensor], Any], rows: Tensor, dim: int, least: int = 1, out_dim: int | None = None
) -> Any:
    """``fn(rows)``, one tensor or several; where there are none, of ``least`` blank rows, and none is kept.

    ``out_dim``: that of the result's rows, if another.
    """
    if rows.shape[dim] > 0:
        return fn(rows)
    return none_of(fn(with_dummy_row(rows, dim, count=least)), dim if out_dim is None else out_dim)


def beside_rows(func: Any, x: PatchTensor, *args: Any, **kwargs: Any) -> PatchTensor:
    """A function that computes each row by itself, of this rank's rows."""
    return wrap(on_some_rows(lambda rows: func(rows, *args, **kwargs), x.local, x.row_layout.dim), x)


def per_dim(value: Any, spatial: int) -> tuple[Any, ...]:
    """One number a spatial dim, from one number or a sequence."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * spatial if len(values) == 1 else values


def normalize_dims(dim: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Dims counted from the front; None means all."""
    if dim is None:
        return tuple(range(ndim))
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return tuple(nth(d, ndim) for d in dims) or tuple(range(ndim))  # type: ignore[arg-type]


def sizes_of(sizes: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> tuple[int, ...]:
    """Sizes given one by one, as one sequence, or by one of these names."""
    for name in names:
        sizes = kwargs.get(name, sizes)
    given: Any = sizes if isinstance(sizes, (tuple, list)) else (sizes,)
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = given[0]
    return tuple(map(operator.index, given))
