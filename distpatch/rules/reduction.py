"""Reductions: local where the sharded dim stays, partial results merged over ranks where it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distpatch.collectives import merge_moments, stack_ranks
from distpatch.rules.fallback import fallback
from distpatch.rules.registry import named, normalize_dims, op_name, rule, sum_ranks, wrap
from distpatch.tensor import PatchTensor

Dims = int | Sequence[int] | None


def _kept(x: PatchTensor, local: Tensor, dims: tuple[int, ...], keepdim: bool) -> PatchTensor:
    """The sharded dim stays; it moves forward by the dims that go before it."""
    gone = 0 if keepdim else sum(d < x.rows.dim for d in dims)
    return wrap(local, x, x.rows.with_dim(x.rows.dim - gone))


@rule(*named("sum", "mean", "nansum"))
def total(func: Any, input: PatchTensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if isinstance(dim, torch.dtype):
        dim, dtype = None, dim
    dims = normalize_dims(dim, input.ndim)
    if input.rows.dim not in dims:
        return _kept(input, func(input.local, dims, keepdim, dtype=dtype), dims, keepdim)
    if op_name(func) == "nansum":
        return fallback(func, input, dim, keepdim, dtype=dtype)
    local = input.local if dtype is None else input.local.to(dtype)
    precise = local.dtype
    if precise.is_floating_point:
        precise = torch.promote_types(precise, torch.float32)
    partial = local.sum(dims, keepdim, dtype=None if precise == local.dtype else precise)
    result = sum_ranks(partial, input, func)
    if op_name(func) == "mean":
        result = result / math.prod(input.shape[d] for d in dims)
    return result.to(local.dtype) if local.dtype.is_floating_point else result


@rule(*named("amax", "amin"))
def extreme(func: Any, input: PatchTensor, dim: Dims = None, keepdim: bool = False) -> Any:
    dims = normalize_dims(dim, input.ndim)
    if input.rows.dim not in dims:
        return _kept(input, func(input.local, dims, keepdim), dims, keepdim)
    local, row = input.local, input.rows.dim
    if local.shape[row] == 0:  # an idle rank offers what never wins, and stays in the autograd graph
        shape = [1 if d == row else n for d, n in enumerate(local.shape)]
        lowest = -math.inf if op_name(func) == "amax" else math.inf
        if not local.dtype.is_floating_point:
            info = torch.iinfo(local.dtype)
            lowest = info.min if op_name(func) == "amax" else info.max
        local = torch.cat([local, local.new_full(shape, lowest)], row)
    ranks = stack_ranks(func(local, dims, keepdim), input.region.comm.name, op_name(func))
    return func(ranks, 0)


@rule(*named("max", "min"))
def extreme_of_all(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return along(func, input, *args, **kwargs)
    return extreme(torch.amax if op_name(func) == "max" else torch.amin, input)


@rule(*named("any", "all"))
def truth(func: Any, input: PatchTensor, dim: Dims = None, keepdim: bool = False) -> Any:
    dims = normalize_dims(dim, input.ndim)
    if input.rows.dim not in dims:
        return _kept(input, func(input.local, dims, keepdim), dims, keepdim)
    counted = input.local != 0 if op_name(func) == "any" else input.local == 0
    found = sum_ranks(counted.sum(dims, keepdim), input, func) > 0
    return found if op_name(func) == "any" else ~found


@rule(*named("var", "std", "var_mean", "std_mean"))
def variance(
    func: Any,
    input: PatchTensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Any:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    dims = normalize_dims(dim, input.ndim)
    name = op_name(func)
    if input.rows.dim not in dims:
        result = func(input.local, dims, correction=correction, keepdim=keepdim)
        if isinstance(result, tuple):
            return tuple(_kept(input, part, dims, keepdim) for part in result)
        return _kept(input, result, dims, keepdim)
    precise = torch.promote_types(input.dtype, torch.float32)
    local = input.local.to(precise)
    a_row = math.prod(input.shape[d] for d in dims) // input.rows.size
    count = a_row * local.shape[input.rows.dim]
    mean = local.sum(dims, keepdim=True) / max(count, 1)
    m2 = (local - mean).square().sum(dims, keepdim=True)
    bounds = input.rows.bounds
    counts = [a_row * (b - a) for a, b in pairwise(bounds)]
    ranks = stack_ranks(torch.stack([mean, m2]), input.region.comm.name, name)
    count, mean, m2 = merge_moments(counts, ranks[:, 0], ranks[:, 1])
    if not keepdim:
        mean, m2 = (t.squeeze(dims) for t in (mean, m2))
    spread = m2 / max(count - correction, 0) if count > correction else m2 / 0.0
    spread = spread.sqrt() if name.startswith("std") else spread
    spread, mean = spread.to(input.dtype), mean.to(input.dtype)
    return (spread, mean) if name.endswith("mean") else spread


@rule(*named("norm", "vector_norm", "logsumexp", "prod", "argmax", "argmin", "count_nonzero", "median"))
def along(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> Any:
    """Reductions along one other dim are local; the rest is gathered."""
    return fallback(func, input, *args, **kwargs)
