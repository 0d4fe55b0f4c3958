"""How rules are written down, and what they share.

A rule is called in place of a torch function that meets a PatchTensor: ``rule(func, *args, **kwargs)``
with the arguments of the call. It reads like this: find the output layout, fetch the rows, call plain
torch on ``.local``, wrap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch import collectives
from distpatch.exchange import fetch_rows
from distpatch.layout import Needs, RowLayout, even_bounds
from distpatch.patch_conv import Slab
from distpatch.tensor import RULES, PatchTensor, Rule, shard_in, whole

R = TypeVar("R", bound=Rule)


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
    function must be overridable by ``__torch_function__``: any torch function, or your own through
    ``torch.overrides.handle_torch_function`` or ``torch.library``.
    """

    def register(handler: R) -> R:
        RULES[func] = lambda _func, *args, **kwargs: handler(*args, **kwargs)
        return handler

    return register


def named(*names: str) -> list[Any]:
    """Every public torch function of these names: torch, Tensor methods, nn.functional, special.

    A name that a torch release does not have is skipped.
    """
    places = (torch, torch.Tensor, F, torch.special, torch.linalg)
    found = [vars(place).get(name) or getattr(place, name, None) for place in places for name in names]
    unique = {id(func): func for func in found if callable(func)}
    return [func for func in unique.values() if not isinstance(func, type)]


def op_name(func: Any) -> str:
    return getattr(func, "__name__", None) or str(func)


def wrap(local: Tensor, like: PatchTensor, layout: RowLayout | None = None) -> PatchTensor:
    """A PatchTensor of the same region; of the same layout where none is given."""
    return PatchTensor(local, layout or like.rows, like.region)


def spread(tensor: Tensor, like: PatchTensor) -> Tensor:
    """A replicated tensor about to meet rows: its gradient will be summed over ranks."""
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


def everything(x: PatchTensor, func: Any) -> Tensor:
    """All rows, to be met by this rank's own: its gradients are partial, and are added at the owners."""
    return fetch(x, (((0, x.rows.size),),) * x.rows.world_size, func)[0]


def halo(x: PatchTensor, needs: Needs, func: Any) -> Slab:
    """This rank's rows with the rows that it needs above and below them."""
    dim, rank = x.rows.dim, x.region.comm.rank
    above, below = fetch(x, needs, func, channels_last=True)
    own = collectives.tie(x.local, above, below)
    (top, _), (bottom, _) = needs[rank]
    pieces = ((top, above), (x.rows.bounds[rank], own), (bottom, below))
    return Slab(pieces, 1, dim, x.rows.size)


def crop(x: PatchTensor, lo: int, hi: int) -> PatchTensor:
    """Rows [lo, hi) of the whole tensor, a view: each rank keeps those of its own."""
    rows, rank = x.rows, x.region.comm.rank
    bounds = tuple(min(max(b, lo), hi) - lo for b in rows.bounds)
    start = min(max(lo - rows.bounds[rank], 0), x.local.shape[rows.dim])
    local = x.local.narrow(rows.dim, start, bounds[rank + 1] - bounds[rank])
    return wrap(local, x, RowLayout(rows.dim, bounds))


def redistribute(x: PatchTensor, layout: RowLayout, func: Any) -> PatchTensor:
    """The same tensor in other rows (same dim: rows move; other dim: gathered and sliced)."""
    if layout == x.rows:
        return x
    if layout.dim != x.rows.dim:
        return shard_in(x.region, whole(x), layout)
    needs = tuple((layout.interval(rank),) for rank in range(layout.world_size))
    return wrap(fetch(x, needs, func)[0], x, layout)


def reshard(region_of: PatchTensor, tensor: Tensor, dim: int) -> PatchTensor:
    """A replicated tensor, sharded evenly along ``dim``: a slice."""
    layout = RowLayout(dim, even_bounds(tensor.shape[dim], region_of.region.comm.size))
    return shard_in(region_of.region, tensor, layout)


def on_some_rows(fn: Callable[[Tensor], Tensor], rows: Tensor, dim: int) -> Tensor:
    """``fn(rows)``; where there are none, of one blank row, of whose result no row is kept.

    Kernels refuse empty images, and an idle rank must keep its place in the autograd graph.
    """
    if rows.shape[dim] > 0:
        return fn(rows)
    blank = rows.new_zeros([1 if d == dim else n for d, n in enumerate(rows.shape)])
    return fn(torch.cat([rows, blank], dim)).narrow(dim, 0, 0)


def per_dim(value: Any, spatial: int) -> tuple[Any, ...]:
    """One number a spatial dim, from one number or a sequence."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * spatial if len(values) == 1 else values


def normalize_dims(dim: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Dims counted from the front; None means all."""
    if dim is None:
        return tuple(range(ndim))
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    for d in dims:
        if not -max(ndim, 1) <= d < max(ndim, 1):
            raise IndexError(f"Dimension out of range (got {d} for a tensor of {ndim} dims)")
    return tuple(d % ndim for d in dims) or tuple(range(ndim))
