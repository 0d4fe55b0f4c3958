"""How rules are written down, and what they share.

A rule is called in place of a torch function that meets a PatchTensor: ``rule(func, *args, **kwargs)``
with the arguments of the call. It reads like this: find the output layout, fetch the rows, call plain
torch on ``.local``, wrap.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch import collectives, formats, lazy
from distpatch.dtensors import is_dtensor, refusal
from distpatch.errors import LayoutError, UnsupportedOpError
from distpatch.exchange import fetch_rows
from distpatch.formats import Order
from distpatch.layout import BlockLayout, Needs, RowLayout, Stencil, even_bounds, plan_edges, plan_stencil
from distpatch.lazy import Recipe
from distpatch.names import op_name as op_name  # noqa: PLC0414 (rules import it from here)
from distpatch.patch_conv import Slab, fewest_calls
from distpatch.stencil import Interval, ceil_div
from distpatch.tensor import RULES, PatchTensor, Rule, shard_in, whole
from distpatch.tree import map_tensors

R = TypeVar("R", bound=Rule)
_PLAIN = (Tensor, torch.nn.Parameter)


def rule(*funcs: Any) -> Callable[[R], R]:
    """Register the decorated rule for these torch functions."""

    def register(handler: R) -> R:
        for func in funcs:
            assert func not in RULES, f"two rules for {func}"
            RULES[func] = handler
        return handler

    return register


def register_rule(func: Any) -> Callable[[R], R]:
    """Give a function of your own (or of torch) a sharded rule: ``@distpatch.register_rule(func)``.

    The rule takes the function's own arguments and is called where one of them is a PatchTensor. The
    function must be overridable by ``__torch_function__``: any torch function, an operator of
    ``torch.library`` (all its overloads), an ``autograd.Function``, or your own through
    ``torch.overrides.handle_torch_function``. For element-wise ones see ``register_pointwise``.
    """

    def register(handler: R) -> R:
        for key in keys(func):
            RULES[key] = lambda _func, *args, **kwargs: handler(*args, **kwargs)
        return handler

    return register


def keys(func: Any) -> list[Any]:
    """What torch may ask a rule for when the function is called: of an operator, itself and its overloads."""
    func = getattr(func, "_opoverload", func)  # of a torch.library.custom_op
    if isinstance(func, torch._ops.OpOverload) and func._overloadpacket.overloads() == [func._overloadname]:
        func = func._overloadpacket
    if isinstance(func, torch._ops.OpOverloadPacket):
        return [func, *(getattr(func, name) for name in func.overloads())]
    return [func]


def named(*names: str) -> list[Any]:
    """Every public torch function of these names: torch, Tensor methods, nn.functional, special.

    A name that a torch release does not have is skipped. Those of ``torch.linalg`` are asked for by
    ``of_linalg``: some do something else than their namesakes (``polar``).
    """
    return _found((torch, torch.Tensor, F, torch.special), names)


def of_linalg(*names: str) -> list[Any]:
    """The functions of these names in torch.linalg; one that a torch release does not have is skipped."""
    return _found((torch.linalg,), names)


def _found(places: tuple[Any, ...], names: tuple[str, ...]) -> list[Any]:
    found = [vars(place).get(name) or getattr(place, name, None) for place in places for name in names]
    unique = {id(func): func for func in found if callable(func)}
    return [func for func in unique.values() if not isinstance(func, type)]


def wrap(local: Tensor | Recipe, like: PatchTensor, layout: RowLayout | None = None) -> PatchTensor:
    """A PatchTensor of the same region; of the same layout where none is given."""
    result = PatchTensor(local, layout or like.rows, like.region)
    if like.cut and isinstance(local, Tensor) and shares_memory(local, like.local):
        result.cut = like.cut
    return result


def may_wait(x: PatchTensor, size_bytes: int | None = None) -> bool:
    """Whether what is made of ``x``, of so many bytes on this rank, may be computed when it is asked for."""
    if not x.region.lazy or torch.is_grad_enabled():
        return False
    known = x.known
    if size_bytes is None:
        size_bytes = known.shape.numel() * known.dtype.itemsize
    return (
        size_bytes >= lazy.LEAST_BYTES
        and type(x) is PatchTensor
        and known.dtype.is_floating_point
        and x.strides is None
        and not x.cut
        and known.shape.numel() > 0
        and known.device.type != "meta"
        and not torch.is_autocast_enabled(known.device.type)
        and not torch.compiler.is_compiling()
    )


def settled(x: PatchTensor) -> PatchTensor:
    """Rows that are dear to compute, or keep more alive than they are, are computed at their next consumer."""
    if x.waits and (x.recipe.heavy or x.recipe.consumers or x.recipe.held_bytes > x.recipe.size_bytes):
        x.local  # noqa: B018
    return x


def shares_memory(local: Tensor, other: Tensor) -> bool:
    """Whether it sees what is written to the other."""
    if torch.compiler.is_compiling():
        return True
    return local is other or local.untyped_storage()._cdata == other.untyped_storage()._cdata


def spread(tensor: Tensor, like: PatchTensor) -> Tensor:
    """A replicated tensor (or all of a sharded one) about to meet rows: its gradient will be summed over ranks."""
    tensor = whole(tensor)
    if type(tensor) not in _PLAIN and is_dtensor(tensor):
        raise UnsupportedOpError(refusal(tensor))
    if torch.is_grad_enabled() and tensor.requires_grad:
        known = like.region.replicas.get(id(tensor))
        if known is not None and known[0] is tensor:
            return known[1]
    return collectives.spread(tensor, like.region.comm.name)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def sum_ranks(partial: Tensor, like: PatchTensor, func: Any) -> Tensor:
    return collectives.sum_partials(partial, like.region.comm.name, op_name(func))


def fetch(x: PatchTensor, needs: Needs, func: Any, channels_last: bool = False) -> list[Tensor]:
    """The intervals of global rows that each rank needs; gradients return and are added."""
    rows, name = x.rows, x.region.comm.name
    return fetch_rows(x.local, rows.dim, rows.bounds, needs, name, op_name(func), channels_last)


def opened(x: PatchTensor) -> PatchTensor:
    """A ``BlockTensor`` with the dim of its blocks in front of its rows again, a view; others as they are."""
    layout = x.rows
    if not isinstance(layout, BlockLayout):
        return x
    sizes = (layout.blocks, x.local.shape[layout.dim] // layout.blocks)
    return wrap(x.local.unflatten(layout.dim, sizes), x, layout.opened)


def everything(x: PatchTensor, func: Any) -> Tensor:
    """All rows in order, to be met by this rank's own: its gradients are partial, and are added at the owners."""
    if isinstance(x.rows, BlockLayout):
        return everything(opened(x), func).flatten(x.rows.dim, x.rows.dim + 1)
    return fetch(x, (((0, x.rows.size),),) * x.rows.world_size, func)[0]


def fetch_edges(x: PatchTensor, needs: Needs, func: Any) -> list[Tensor]:
    """As ``fetch`` of rows that are all other ranks' own; of rows that wait, only those are computed."""
    plan, dim, recipe = plan_edges(x.rows.bounds, needs), x.rows.dim, x.as_recipe
    strips = [recipe.evaluate(lo, hi) for lo, hi in plan.strips[x.region.comm.rank]]
    edges = torch.cat(strips, dim) if strips else recipe.sample()
    return fetch_rows(edges, dim, plan.bounds, plan.needs, x.region.comm.name, op_name(func), True)


def halo(x: PatchTensor, needs: Needs, func: Any, fill: float = 0.0, wait: bool = False) -> Slab:
    """This rank's rows with the rows that it needs above and below them; beyond the image, ``fill``.

    ``wait``: without computing the rank's own, if they wait (inference only).
    """
    dim, rank = x.rows.dim, x.region.comm.rank
    own: Any
    if wait:
        above, below = fetch_edges(x, needs, func)  # no views of the rank's own: somebody may write over these
        own = x.as_recipe
    else:
        above, below = fetch(x, needs, func, channels_last=True)
        own = collectives.tie(x.local, above, below)
    (top, _), (bottom, _) = needs[rank]
    pieces = ((top, above), (x.rows.bounds[rank], own), (bottom, below))
    return Slab(pieces, 1, dim, x.rows.size, fill)


def slab_of(x: PatchTensor, stencil: Stencil, func: Any, fill: float = 0.0) -> tuple[Slab, Interval, RowLayout]:
    """What a stencil reads on this rank, the output rows that the rank owns, and the output's layout."""
    plan, rank = plan_stencil(x.rows.bounds, stencil), x.region.comm.rank
    out = plan.out[rank], plan.out[rank + 1]
    return halo(x, plan.needs, func, fill), out, x.rows.with_bounds(plan.out)


def over_rows(
    compute: Callable[[Tensor, int, int, int], Any],
    x: PatchTensor,
    stencil: Stencil,
    func: Any,
    fill: float = 0.0,
    view: bool = False,
    growth: int = 1,
) -> Any:
    """``compute(rows, start, lo, hi)``: output rows [lo, hi) of a stencil, from all the input rows that
    they read, the first of them ``start``. Returns what it returns, one tensor or several, sharded.

    An idle rank computes the first output row of a blank image, and keeps none. More elements than kernels can
    index are computed in parts, unless the result is a ``view``; ``growth``: how many times longer a row becomes.
    """
    slab, (lo, hi), layout = slab_of(x, stencil, func, fill)
    if lo < hi:
        own = x.local.shape[slab.dim]
        largest = x.local.numel() * max(growth * (hi - lo), own) // max(own, 1)
        step = hi - lo if view else ceil_div(hi - lo, fewest_calls(largest))
        parts = []
        for a in range(lo, hi, step):
            start, stop = stencil.need(a, min(a + step, hi))
            parts.append(compute(slab.rows(start, stop), start, a, min(a + step, hi)))
        result = parts[0] if len(parts) == 1 else joined(parts, slab.dim)
    else:
        start, stop = stencil.need(0, 1)
        result = compute(slab.blank(stop - start), start, 0, 1)
        result = none_of(result, slab.dim)
    return map_tensors(lambda t: wrap(t, x, layout), result)


def joined(parts: Sequence[Any], dim: int) -> Any:
    """Parts of a tensor, or of several, put together."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts), dim)
    return type(parts[0])(joined(each, dim) for each in zip(*parts))


def in_compute_dtype(x: PatchTensor) -> PatchTensor:
    """In the dtype that autocast convolves in, so that halo rows are sent in it."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.dtype.is_floating_point or x.dtype == torch.float64:
        return x
    return wrap(x.local.to(torch.get_autocast_dtype(kind)), x)


def crop(x: PatchTensor, lo: int, hi: int) -> PatchTensor:
    """Rows [lo, hi) of the whole tensor, a view: each rank keeps those of its own."""
    rows, rank = x.rows, x.region.comm.rank
    bounds = tuple(min(max(b, lo), hi) - lo for b in rows.bounds)
    start = min(max(lo - rows.bounds[rank], 0), x.local.shape[rows.dim])
    local = x.local.narrow(rows.dim, start, bounds[rank + 1] - bounds[rank])
    return part_of(x, local, RowLayout(rows.dim, bounds))


def part_of(x: PatchTensor, local: Tensor, layout: RowLayout, step: int = 1) -> PatchTensor:
    """A view of some of the rows, every ``step``-th one."""
    result = wrap(local, x, layout)
    if layout.size != x.rows.size and not torch.compiler.is_compiling():
        result.cut = max(x.cut, 1) * step
    return result


def order_of(x: PatchTensor) -> Order:
    """How its dims stand in memory, innermost first; without computing rows that wait."""
    if x.strides is not None:
        return formats.order_by(x.shape, x.strides)
    return formats.order_in(x.recipe.format, x.ndim) if x.waits else formats.memory_order(x.local)


def redistribute(x: PatchTensor, layout: RowLayout, func: Any) -> PatchTensor:
    """The same tensor in other rows, or sharded along another dim; one exchange either way."""
    if layout == x.rows:
        return x
    if layout.dim != x.rows.dim:
        return _turn(x, layout, func)
    needs = tuple((layout.interval(rank),) for rank in range(layout.world_size))
    return placed(fetch(x, needs, func)[0], x, layout)


def placed(local: Tensor, x: PatchTensor, layout: RowLayout | None = None) -> PatchTensor:
    """Rows that came from elsewhere, in memory as those of ``x``."""
    result = wrap(formats.in_memory_order(local, order_of(x)), x, layout)
    if result.rows.is_tiny and not torch.compiler.is_compiling():
        result.strides = x.stride()
    return result


def _turn(x: PatchTensor, layout: RowLayout, func: Any) -> PatchTensor:
    """Every rank sends every other its slice of the new dim, in its own rows of the old one."""
    old, new, name = x.rows.dim, layout.dim, x.region.comm.name
    heights = [hi - lo for lo, hi in pairwise(x.rows.bounds)]
    held = tuple(layout.size * b for b in x.rows.bounds)
    needs = tuple(
        tuple((first + lo * height, first + hi * height) for first, height in zip(held, heights))
        for lo, hi in pairwise(layout.bounds)
    )
    wire = x.local.movedim((new, old), (0, 1)).flatten(0, 1)
    pieces = fetch_rows(wire, 0, held, needs, name, op_name(func), False)
    lo, hi = layout.interval(x.region.comm.rank)
    parts = [piece.reshape(hi - lo, height, *wire.shape[1:]) for piece, height in zip(pieces, heights)]
    local = torch.cat(parts, 1).movedim((0, 1), (new, old))
    return placed(local, x, layout)


def along_rows(x: PatchTensor, func: Any) -> PatchTensor:
    """Where it is sharded along its channels (a reshape has made them of rows): along rows again, if it has any."""
    if x.rows.dim != 1 or x.ndim < 3:
        return x
    dim = max(2, x.ndim - 2)
    return redistribute(x, RowLayout(dim, even_bounds(x.shape[dim], x.region.comm.size)), func)


def rows_of(tensor: Tensor, lead: PatchTensor, dim: int, func: Any) -> Tensor:
    """This rank's rows of an operand whose dim ``dim`` (counted from the back) meets the lead's rows.

    As ``own_rows``, except that an operand of height 1, or without that dim, is used as it is (gathered first
    where it is sharded), since it will be broadcast.
    """
    if tensor.ndim >= -dim and tensor.shape[dim] != 1:
        return own_rows(tensor, lead, dim, func)
    if isinstance(tensor, PatchTensor) and tensor.ndim >= -dim and lead.rows.size == 1:
        return own_rows(tensor, lead, dim, func)
    return spread(whole(tensor), lead)


def check_group(tensor: PatchTensor, lead: PatchTensor, func: Any) -> None:
    """Two tensors that meet are sharded over the same ranks."""
    if tensor.region is not lead.region and tensor.region.comm is not lead.region.comm:
        raise LayoutError(
            f"{op_name(func)}: {tensor!r} and {lead!r} are sharded over different groups. Gather one of them "
            "(distpatch.gather) and shard it over the other's group."
        )


def own_rows(tensor: Tensor, lead: PatchTensor, dim: int, func: Any) -> Tensor:
    """This rank's rows of an operand as tall as the lead: sliced where it is plain, else redistributed."""
    if tensor.ndim < -dim or tensor.shape[dim] != lead.rows.size:
        raise RuntimeError(f"{op_name(func)}: a tensor of shape {tuple(tensor.shape)} does not fit {tuple(lead.shape)}")
    if isinstance(tensor, PatchTensor):
        check_group(tensor, lead, func)
        return redistribute(tensor, lead.rows.with_dim(tensor.ndim + dim), func).local
    lo, hi = lead.rows.interval(lead.region.comm.rank)
    return spread(tensor, lead).narrow(dim, lo, hi - lo)


def reshard(region_of: PatchTensor, tensor: Tensor, dim: int) -> PatchTensor:
    """A replicated tensor, sharded evenly along ``dim``: a slice."""
    layout = RowLayout(dim, even_bounds(tensor.shape[dim], region_of.region.comm.size))
    return shard_in(region_of.region, tensor, layout)


def on_some_rows(
    fn: Callable[[Tensor], Any], rows: Tensor, dim: int, least: int = 1, out_dim: int | None = None
) -> Any:
    """``fn(rows)``, one tensor or several; where there are none, of ``least`` blank rows, and none is kept.

    Kernels refuse empty images, and an idle rank must keep its place in the autograd graph: the same operations
    as on other ranks, so that derivatives of any order reach the same exchanges. ``out_dim``: that of the result's
    rows, if another.
    """
    if rows.shape[dim] > 0:
        return fn(rows)
    blank = rows.new_zeros([least if d == dim else n for d, n in enumerate(rows.shape)])
    return none_of(fn(torch.cat([rows, blank], dim)), dim if out_dim is None else out_dim)


def written(x: PatchTensor) -> PatchTensor:
    """A tensor whose rows were written to. Where there are none and they are a view, they are taken from it anew:

    the derivative of what autograd puts in a written view's place is cut off in torch where the view is empty.
    """
    base = x.local._base
    if base is not None and x.local.numel() == 0 and type(x.local.grad_fn).__name__.startswith("AsStrided"):
        x.local = base.reshape(-1).narrow(0, 0, 0).view(x.local.shape)
    return x


def none_of(result: Any, dim: int) -> Any:
    """No rows of one tensor or several; no view, so that a write to them is recorded as on other ranks."""
    return map_tensors(lambda t: t.narrow(dim, 0, 0).clone(), result)


def per_dim(value: Any, spatial: int) -> tuple[Any, ...]:
    """One number a spatial dim, from one number or a sequence."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * spatial if len(values) == 1 else values


def nth(dim: int, ndim: int) -> int:
    """A dim counted from the front; ``IndexError`` where there is no such dim."""
    dim, most = operator.index(dim), max(ndim, 1)
    if not -most <= dim < most:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-most}, {most - 1}], but got {dim})")
    return dim % most


def normalize_dims(dim: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Dims counted from the front; None means all."""
    if dim is None:
        return tuple(range(ndim))
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return tuple(nth(d, ndim) for d in dims) or tuple(range(ndim))  # type: ignore[arg-type]
