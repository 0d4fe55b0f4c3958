"""Reductions: local where the sharded dim stays, partial results merged over ranks where it goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.collectives import stack_ranks
from distpatch.lazy.row_patches import with_dummy_row
from distpatch.rules.core.operands import autocast, kept, local_rows_of, needs_grad, normalize_dims, precise, sum_ranks
from distpatch.rules.core.registry import named, rule
from distpatch.rules.core.wrapping import on_some_rows
from distpatch.rules.reductions.moments import merge_ranks, moments
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors

Dims = int | Sequence[int] | None


def _added(add: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A sum of rows; of half precision in fp32, until those of all ranks are added."""

    def partial(rows: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
        exact = precise(rows.dtype)
        return add(rows, dims, keepdim, dtype=None if exact == rows.dtype else exact)

    return partial


def _in_dtype(merged: Tensor, rows: Tensor, count: Any = 1) -> Tensor:
    return merged.to(rows.dtype) if rows.dtype.is_floating_point else merged


def _averaged(merged: Tensor, rows: Tensor, count: Any) -> Tensor:
    return _in_dtype(merged / count, rows)


def _of_truth(found: Tensor, rows: Tensor) -> Tensor:
    return found.to(torch.uint8) if rows.dtype == torch.uint8 else found


# What each rank makes of its rows, ``(rows, dims, keepdim)``; and the result, of what these add up to, the rank's rows
# and how many elements were reduced.
_SUMS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor, Any], Tensor]]] = {
    "sum": (_added(torch.sum), _in_dtype),
    "nansum": (_added(torch.nansum), _in_dtype),
    "mean": (_added(torch.sum), _averaged),
    "nanmean": (_added(torch.nansum), _averaged),
    "any": (lambda rows, *at: (rows != 0).sum(*at), lambda n, rows, _: _of_truth(n > 0, rows)),
    "all": (lambda rows, *at: (rows == 0).sum(*at), lambda n, rows, _: _of_truth(n == 0, rows)),
}


@rule(*named(*_SUMS), any_order=True)
def reduce(func: Any, input: PatchTensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Local where the rows stay; else a rank's own first, which are then added."""
    if isinstance(dim, torch.dtype):
        dim, dtype = None, dim
    name, dims, kind = op_name(func), normalize_dims(dim, input.ndim), dtype or input.dtype
    partial, finish = _SUMS[name]
    averages = name.endswith("mean")
    if input.row_layout.dim not in dims or (averages and not (kind.is_floating_point or kind.is_complex)):
        options = {} if dtype is None else {"dtype": dtype}
        return kept(input, func(input.local, dims, keepdim, **options), dims, keepdim)
    input = autocast(input, func) if name not in {"any", "all"} else input
    rows = input.local if dtype is None else input.local.to(dtype)
    merged, count = sum_ranks(partial(rows, dims, keepdim), input, func), None
    if averages:
        count = math.prod(input.shape[d] for d in dims)
        if name == "nanmean":
            count = sum_ranks((~rows.isnan()).sum(dims, keepdim), input, func)
    return finish(merged, rows, count)


@rule(*named("count_nonzero"), any_order=True)
def count_nonzero(func: Any, input: PatchTensor, dim: Dims = None) -> Any:
    dims = normalize_dims(dim, input.ndim)
    local = input.local.count_nonzero(dims)
    return sum_ranks(local, input, func) if input.row_layout.dim in dims else kept(input, local, dims, False)


@rule(*named("bincount"), asks_if_empty=True)
def bincount(func: Any, input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Any:
    """How many numbers there are says the largest of all ranks, as on one device the host waits for it."""
    if not isinstance(input, PatchTensor) or input.ndim != 1 or torch.compiler.is_compiling():
        return NotImplemented
    count = max(minlength, int(input.max()) + 1)
    if weights is None:
        return sum_ranks(func(input.local, None, count), input, func)
    own = local_rows_of(weights, input, -1, func)  # torch gives another dtype where there are none
    return sum_ranks(func(with_dummy_row(input.local, 0), with_dummy_row(own, 0), count), input, func)


@rule(*named("histc"), any_order=True)
def histogram(func: Any, input: PatchTensor, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """Of equal bounds torch takes the smallest and the largest value, which the host would have to read here."""
    if min == max:
        return NotImplemented
    return sum_ranks(func(input.local, bins, min, max), input, func)


@rule(*named("prod"), any_order=True)
def product(func: Any, input: PatchTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if isinstance(dim, torch.dtype):
        dim, dtype = None, dim
    dims, options = normalize_dims(dim, input.ndim), {} if dtype is None else {"dtype": dtype}
    local = input.local.prod(**options) if dim is None else input.local.prod(dims[0], keepdim, **options)
    if input.row_layout.dim not in dims:
        return kept(input, local, dims, keepdim)
    return stack_ranks(local, input.comm.name, op_name(func)).prod(0)


@rule(*named("var", "std", "var_mean", "std_mean"), order_free=True)
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
    _, mean, m2 = moments(input.local, dims, row, op_name(func), exact=True)
    count, mean, m2 = merge_ranks(input.row_layout, a_row, mean, m2, input.comm.name, name)
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


@rule(*named("logsumexp"), asks_if_empty=True, order_free=True)
def logsumexp(func: Any, input: PatchTensor, dim: Dims, keepdim: bool = False) -> Any:
    dims = normalize_dims(dim, input.ndim)
    if input.row_layout.dim not in dims:
        return kept(input, func(input.local, dims, keepdim), dims, keepdim)
    if input.is_complex():
        return NotImplemented
    top = input.detach().amax(dims, keepdim=True)
    top = torch.where(top.isinf(), 0.0, top)
    result = (input - top).exp().sum(dims, keepdim=True).log() + top
    return result if keepdim else result.squeeze(dims)


@rule(torch.linalg.vector_norm, asks_if_empty=True, order_free=True)
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
    real = torch.empty(0, dtype=kind).abs().dtype
    rows = x.local if ord >= 0 else with_dummy_row(x.local, x.row_layout.dim, math.inf)
    if ord == 0:  # of no rows at all torch's own of complex numbers warns
        return sum_ranks(func(rows.abs(), ord, dims, keepdim, dtype=precise(real)), x, func).to(real)
    partial = func(rows, ord, dims, keepdim, dtype=precise(kind))
    with torch.set_grad_enabled(torch.is_grad_enabled() and 0 < ord < 1):
        ranks = stack_ranks(partial, x.comm.name, op_name(func))
        result = func(ranks, ord, 0)
    if ord >= 1 or ord < 0:
        result = _with_gradient(x, result, ord, dims, keepdim, func)
    return result.to(real)


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
