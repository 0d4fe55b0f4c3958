"""Reductions: local where the sharded dim stays, partial results merged over ranks where it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.collectives import stack_ranks
from distpatch.rules.core.operands import (
    autocast,
    kept,
    needs_grad,
    never_empty,
    normalize_dims,
    on_some_rows,
    precise,
    sum_ranks,
)
from distpatch.rules.core.registry import named, rule
from distpatch.rules.reductions.moments import merge_ranks, moments
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors

Dims = int | Sequence[int] | None


@rule(*named("sum", "mean", "nansum", "nanmean"), any_order=True)
def total(func: Any, input: PatchTensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if isinstance(dim, torch.dtype):
        dim, dtype = None, dim
    dims = normalize_dims(dim, input.ndim)
    kind = dtype or input.dtype
    averaged = op_name(func).endswith("mean")
    if input.row_layout.dim not in dims or (averaged and not (kind.is_floating_point or kind.is_complex)):
        return kept(input, func(input.local, dims, keepdim, dtype=dtype), dims, keepdim)
    input = autocast(input, func)
    local, nan = input.local if dtype is None else input.local.to(dtype), op_name(func).startswith("nan")
    exact = precise(local.dtype)
    add = torch.nansum if nan else torch.sum
    result = sum_ranks(add(local, dims, keepdim, dtype=None if exact == local.dtype else exact), input, func)
    if averaged:
        count: Any = math.prod(input.shape[d] for d in dims)
        if nan:
            count = sum_ranks((~local.isnan()).sum(dims, keepdim), input, func)
        result = result / count
    return result.to(local.dtype) if local.dtype.is_floating_point else result


@rule(*named("any", "all"), any_order=True)
def truth(func: Any, input: PatchTensor, dim: Dims = None, keepdim: bool = False) -> Any:
    dims = normalize_dims(dim, input.ndim)
    if input.row_layout.dim not in dims:
        return kept(input, func(input.local, dims, keepdim), dims, keepdim)
    counted = input.local != 0 if op_name(func) == "any" else input.local == 0
    found = sum_ranks(counted.sum(dims, keepdim), input, func) > 0
    result = found if op_name(func) == "any" else ~found
    return result.to(torch.uint8) if input.dtype == torch.uint8 else result


@rule(*named("count_nonzero"), any_order=True)
def count_nonzero(func: Any, input: PatchTensor, dim: Dims = None) -> Any:
    dims = normalize_dims(dim, input.ndim)
    counts = func(input.local, dims)
    return sum_ranks(counts, input, func) if input.row_layout.dim in dims else kept(input, counts, dims, False)


@rule(*named("prod"))
def product(func: Any, input: PatchTensor, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if isinstance(dim, torch.dtype):
        dim, dtype = None, dim
    partial = func(input.local, dtype=dtype) if dim is None else func(input.local, dim, keepdim, dtype=dtype)
    dims = normalize_dims(dim, input.ndim)
    if input.row_layout.dim not in dims:
        return kept(input, partial, dims, keepdim)
    return stack_ranks(partial, input.region.comm.name, op_name(func)).prod(0)


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
    dims, row, name = normalize_dims(dim, input.ndim), input.row_layout.dim, op_name(func)
    if input.row_layout.dim not in dims:  # torch warns of a variance of no rows
        result = on_some_rows(lambda rows: func(rows, dims, correction=correction, keepdim=True), input.local, row)
        return kept(input, result if keepdim else map_tensors(lambda t: t.squeeze(dims), result), dims, keepdim)
    if not input.dtype.is_floating_point:
        return NotImplemented
    a_row = math.prod(input.shape[d] for d in dims) // max(input.row_layout.size, 1)
    _, mean, m2 = moments(input.local, dims, row, exact=True)
    count, mean, m2 = merge_ranks(input.row_layout, a_row, mean, m2, input.region.comm.name, name)
    if not keepdim:
        mean, m2 = (t.squeeze(dims) for t in (mean, m2))
    mean = mean if count else mean * math.nan
    spread = m2 / max(count - correction, 0) if count > max(correction, 0) else m2 / 0.0
    if name.startswith("std"):  # of equal values the gradient is 0 too, not what rounding makes it
        level = (m2 <= _rounding(count, mean.detach(), input.dtype)) & (spread < math.inf)
        spread = torch.where(level, 0.0, torch.where(level, 1.0, spread).sqrt())
    spread, mean = spread.to(input.dtype), mean.to(input.dtype)
    return (spread, mean) if name.endswith("mean") else spread


def _rounding(count: int, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """What centring may leave of the second moment of equal values: less than one of them changed by a bit."""
    eps = torch.finfo(precise(dtype)).eps
    return count * 1024 * eps * (eps * mean).square()


@rule(*named("logsumexp"), asks_if_empty=True)
def logsumexp(func: Any, input: PatchTensor, dim: Dims, keepdim: bool = False) -> Any:
    dims = normalize_dims(dim, input.ndim)
    if input.row_layout.dim not in dims:
        return kept(input, func(input.local, dims, keepdim), dims, keepdim)
    top = input.detach().amax(dims, keepdim=True)
    top = torch.where(top.isinf(), 0.0, top)
    result = (input - top).exp().sum(dims, keepdim=True).log() + top
    return result if keepdim else result.squeeze(dims)


@rule(torch.linalg.vector_norm, asks_if_empty=True)
def vector_norm(
    func: Any, x: PatchTensor, ord: Any = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """Of a norm of each rank's rows the same norm is taken again."""
    dims = normalize_dims(dim, x.ndim)
    if x.row_layout.dim not in dims:
        return kept(x, func(x.local, ord, dims, keepdim, dtype=dtype), dims, keepdim)
    x = autocast(x, func)
    if abs(ord) == math.inf:  # their gradients are shared by the winners
        x = x if dtype is None else x.to(dtype)  # type: ignore[assignment]
        return x.abs().amax(dims, keepdim) if ord > 0 else x.abs().amin(dims, keepdim)
    kind = dtype or x.dtype
    rows = x.local if ord >= 0 else never_empty(x, math.inf)
    partial = func(rows, ord, dims, keepdim, dtype=precise(kind))
    if ord == 0:
        return sum_ranks(partial, x, func).to(kind)
    with torch.set_grad_enabled(torch.is_grad_enabled() and 0 < ord < 1):
        ranks = stack_ranks(partial, x.region.comm.name, op_name(func))
        result = func(ranks, ord, 0)
    if ord >= 1 or ord < 0:
        result = _with_gradient(x, result, ord, dims, keepdim, func)
    return result.to(torch.empty(0, dtype=kind).abs().dtype)


def _with_gradient(x: PatchTensor, norm: Tensor, ord: float, dims: Sequence[int], keepdim: bool, func: Any) -> Tensor:
    """The norm as a sum of powers of values that it divides, which has derivatives where a rank's own norm is 0.

    By the norm itself, a constant: no power overflows.
    """
    if not needs_grad(x.local):
        return norm
    scale = torch.where((norm == 0) | norm.isinf(), 1.0, norm)
    broad = scale if keepdim else scale.view([1 if d in dims else n for d, n in enumerate(x.shape)])
    powers = (x.local.to(norm.dtype if not x.dtype.is_complex else x.dtype) / broad).abs().pow(ord)
    total = sum_ranks(powers.sum(tuple(dims), keepdim), x, func)
    none = total == 0  # as torch, which has no gradient there
    return torch.where(none, norm, torch.where(none, 1.0, total).pow(1 / ord) * scale)


@rule(*named("norm"), asks_if_empty=True)
def norm(
    func: Any,
    input: PatchTensor,
    p: Any = "fro",
    dim: Dims = None,
    keepdim: bool = False,
    out: Any = None,
    dtype: Any = None,
) -> Any:
    if p == "nuc" or out is not None:
        return NotImplemented
    return torch.linalg.vector_norm(input, 2 if p in {"fro", None} else p, dim, keepdim, dtype=dtype)


@rule(torch.linalg.norm, torch.linalg.matrix_norm, asks_if_empty=True)
def linalg_norm(
    func: Any,
    A: PatchTensor,
    ord: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Any:
    """A vector's norm, or a matrix's where that is a sum of columns; singular values take the fallback."""
    if op_name(func).endswith("matrix_norm"):
        ord, dim = "fro" if ord is None else ord, (-2, -1) if dim is None else dim
    if dim is None and ord is not None and A.ndim == 2:
        dim = (0, 1)
    is_matrix = ord is not None and isinstance(dim, (tuple, list)) and len(dim) == 2
    if not is_matrix or ord == "fro":
        return torch.linalg.vector_norm(A, 2 if ord in {None, "fro"} else ord, dim, keepdim, dtype=dtype)
    if ord not in {1, -1, math.inf, -math.inf}:
        return NotImplemented
    row, column = normalize_dims(dim, A.ndim)
    added, compared = (row, column) if abs(ord) == 1 else (column, row)
    sums = torch.linalg.vector_norm(A, 1, added, True, dtype=dtype)
    result = sums.amax(compared, True) if ord > 0 else sums.amin(compared, True)
    return result if keepdim else result.squeeze((row, column))
