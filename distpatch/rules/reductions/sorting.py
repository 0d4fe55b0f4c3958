"""Sorting and ranking: local beside the rows; along them each rank has other slices whole, vectors are merged."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distpatch.layout.blocks import BlockLayout
from distpatch.layout.rows import RowLayout
from distpatch.rules.core.operands import kept
from distpatch.rules.core.redistribution import fetch, in_order, inner_dims, redistribute, turned, widest_beside
from distpatch.rules.core.registry import beside_rows, named, nth, rule
from distpatch.rules.core.wrapping import on_some_rows, wrap
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors


def _along(input: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether the one dim that a function works along, by default the last, is the sharded one."""
    dim = kwargs.get("dim", next((a for a in args if type(a) is int), -1))
    return isinstance(input, PatchTensor) and dim is not None and nth(dim, input.ndim) == input.row_layout.dim


@rule(*named("sort"), asks_if_empty=True, any_order=_along, order_free=beside_rows)
@rule(*named("median", "nanmedian", "mode"), asks_if_empty=True, order_free=beside_rows)
@rule(*named("argsort", "cummax", "cummin"), any_order=_along, order_free=beside_rows)
def one_dim(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> Any:
    """Along one dim, by default the last. Without a dim, medians are of all elements."""
    whole_by_default = op_name(func).endswith("median")
    dim = kwargs.get("dim", next((a for a in args if type(a) is not bool), None if whole_by_default else -1))
    return _ranked(func, input, dim, args, kwargs, removes=op_name(func) in {"median", "nanmedian", "mode"})


@rule(
    *named("topk", "kthvalue"),
    asks_if_empty=True,
    any_order=lambda input, k, *args, **more: _along(input, *args, **more),
    order_free=lambda input, k, *args, **more: beside_rows(input, *args, **more),
)
def best(func: Any, input: PatchTensor, k: int, *args: Any, **kwargs: Any) -> Any:
    dim = kwargs.get("dim", args[0] if args else -1)
    return _ranked(func, input, dim, (k, *args), kwargs, removes=op_name(func) == "kthvalue")


def _ranked(func: Any, input: PatchTensor, dim: int | None, args: Any, kwargs: Any, removes: bool) -> Any:
    if dim is None:
        return NotImplemented
    dim, row = nth(dim, input.ndim), input.row_layout.dim
    if dim == row:
        return _along_rows(func, input, args, kwargs, removes)
    keepdim = kwargs.get("keepdim", next((a for a in args if type(a) is bool), False)) or not removes
    gone = 0 if keepdim else dim < row
    local = on_some_rows(lambda rows: func(rows, *args, **kwargs), input.local, row, out_dim=row - gone)
    return kept(input, local, (dim,), keepdim)


def _along_rows(func: Any, input: PatchTensor, args: Any, kwargs: Any, removes: bool) -> Any:
    """Two exchanges of all elements, each between all ranks. What is not as tall as the input is replicated."""
    rows = input.row_layout
    widest = widest_beside(input, (rows.dim,))
    is_vector = widest is None or input.shape[widest] == 1
    if isinstance(rows, BlockLayout) and (widest is None or (is_vector and not input.region.level)):
        return func(in_order(input), *args, **kwargs)
    if widest is None or (is_vector and not isinstance(rows, BlockLayout)):  # blocks of an inner axis go to one rank
        may = op_name(func) in {"sort", "argsort"} and not input.dtype.is_complex and input.dtype != torch.uint64
        return _of_vector(func, input, args, kwargs) if may else NotImplemented
    result = _ranked(func, turned(input, widest, func), rows.dim, args, kwargs, removes)

    def back(tensor: Tensor) -> Tensor:
        if not removes and isinstance(tensor, PatchTensor) and tensor.shape[rows.dim] == rows.size:
            if rows.dim in inner_dims(tensor):  # which could not be shared out over this axis too without all of it
                return tensor
            return redistribute(tensor, rows, func)
        return gather_replicated(tensor, op_name(func))

    return map_tensors(back, result)


def _of_vector(func: Any, input: PatchTensor, args: Any, kwargs: Any) -> Any:
    """Each rank sorts its rows; where one of them stands among all, the sorted rows of every other rank tell, in turn.

    Equal ones stay in their order, as with ``stable=True``.
    """
    given = {**dict(zip(("dim", "descending"), (a for a in args if a is not None))), **kwargs}
    dim, own, name = input.row_layout.dim, input.rank, op_name(func)
    bounds, world = input.row_layout.bounds, input.row_layout.world_size
    with torch.no_grad():
        keys = _integers(input.local.flatten())
        run, order = torch.sort(~keys if given.get("descending") else keys, stable=True)
        places = torch.arange(len(run), device=run.device)
        line = RowLayout(0, bounds)
        for rank, (lo, hi) in enumerate(pairwise(bounds)):
            whole = fetch(wrap(run, input, line), (((lo, hi),),) * world, func)[0]
            if rank != own:
                places += torch.searchsorted(whole, run, right=rank < own)
        first, last = input.own_interval
        found = run.new_empty(last - first + 1)  # the last one takes what is other ranks'
        sent = torch.stack([places, order + first], 1)
        for lo, hi in pairwise(bounds):
            at, which = fetch(wrap(sent, input, line), (((lo, hi),),) * world, func)[0].unbind(1)
            found.scatter_(0, torch.where((at >= first) & (at < last), at - first, last - first), which)
        index = wrap(found[:-1].view(input.local.shape), input)
    if name == "argsort":
        return index
    return torch.return_types.sort((torch.gather(input, dim, index), index))


def _integers(values: Tensor) -> Tensor:
    """Numbers in the order of these: NaNs last, and zeros of both signs alike."""
    if not values.dtype.is_floating_point:
        return values.long()
    bits = (values.double() + 0.0).view(torch.int64)
    return torch.where(
        values.isnan(), torch.iinfo(torch.int64).max, bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)
    )
