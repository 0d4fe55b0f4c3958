"""Products of matrices: rows of the left stay, the right is needed whole, a shared dim is summed."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from distpatch.rules.fallback import fallback
from distpatch.rules.registry import everything, named, redistribute, rule, spread, sum_ranks, wrap
from distpatch.tensor import PatchTensor


@rule(F.linear)
def linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(input, PatchTensor) or input.rows.dim == input.ndim - 1:
        return fallback(func, input, weight, bias)
    bias = None if bias is None else spread(bias, input)
    return wrap(func(input.local, spread(weight, input), bias), input)


@rule(*named("matmul", "bmm", "__matmul__", "mm"))
def matmul(func: Any, left: Tensor, right: Tensor) -> Any:
    """(..., N, K) @ (..., K, M); vectors take the fallback."""
    if left.ndim < 2 or right.ndim < 2:
        return fallback(func, left, right)
    ndim = max(left.ndim, right.ndim)
    at = {
        "left": left.rows.dim - left.ndim if isinstance(left, PatchTensor) else None,
        "right": right.rows.dim - right.ndim if isinstance(right, PatchTensor) else None,
    }
    if isinstance(left, PatchTensor) and at["left"] == -2:
        other = everything(right, func) if isinstance(right, PatchTensor) else spread(right, left)
        return wrap(func(left.local, other), left, left.rows.with_dim(ndim - 2))
    if isinstance(right, PatchTensor) and at["right"] == -1:
        other = everything(left, func) if isinstance(left, PatchTensor) else spread(left, right)
        return wrap(func(other, right.local), right, right.rows.with_dim(ndim - 1))
    if isinstance(left, PatchTensor) and isinstance(right, PatchTensor):
        if at == {"left": -1, "right": -2}:  # contraction over the rows
            right = redistribute(right, left.rows.with_dim(right.ndim - 2), func)
            return sum_ranks(func(left.local, right.local), left, func)
        if at["left"] == at["right"] and left.rows.size == right.rows.size:  # a batch dim
            assert at["left"] is not None
            right = redistribute(right, left.rows.with_dim(right.rows.dim), func)
            return wrap(func(left.local, right.local), left, left.rows.with_dim(ndim + at["left"]))
    return fallback(func, left, right)
