"""Functions that work along one dim: local beside the sharded one; along it, ranks tell each other totals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.comm.collectives import replicated_operand, stack_ranks
from distpatch.rules.core.operands import autocast, precise
from distpatch.rules.core.registry import beside_rows, named, nth, rule
from distpatch.rules.core.wrapping import wrap
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.op_names import op_name


@rule(*named("softmax", "log_softmax"), any_order=True, asks_if_empty=True, of_many_kernels=True)
def softmax(func: Any, input: PatchTensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """Of exponents shifted by the largest of all ranks, divided by their sum over all ranks."""
    if isinstance(_stacklevel, torch.dtype):  # in the place of dtype, except in nn.functional
        dtype = _stacklevel
    if dim is None:
        dim = F._get_softmax_dim(op_name(func), input.ndim, 3)  # type: ignore[attr-defined]
    at = nth(dim, input.ndim)
    if at != input.row_layout.dim or not input.numel():
        return wrap(func(input.local, at, dtype=dtype), input)
    input = autocast(input, lambda t: func(t, 0))
    kind = dtype or input.dtype
    x = input.to(precise(kind))
    shifted = x - x.detach().amax(at, keepdim=True)
    if op_name(func).endswith("log_softmax"):
        return (shifted - shifted.exp().sum(at, keepdim=True).log()).to(kind)
    exponents = shifted.exp()
    return (exponents / exponents.sum(at, keepdim=True)).to(kind)


@rule(*named("cumsum", "cumprod", "logcumsumexp"), order_free=beside_rows)
def cumulative(func: Any, input: PatchTensor, dim: int, *, dtype: Any = None) -> Any:
    """Each rank's own, on top of the totals of the ranks before it."""
    at, options = nth(dim, input.ndim), {} if dtype is None else {"dtype": dtype}
    if at != input.row_layout.dim:
        return wrap(func(input.local, at, **options), input)
    name = op_name(func)
    input = autocast(input, lambda t: func(t, 0))
    merges: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "cumsum": (torch.add, torch.sum),
        "cumprod": (torch.mul, torch.prod),
        "logcumsumexp": (torch.logaddexp, torch.logsumexp),
    }
    add, total = merges[name]
    kind = dtype or (input.dtype if input.dtype.is_floating_point or input.dtype.is_complex else torch.int64)
    local = input.local.to(precise(kind))
    totals = replicated_operand(stack_ranks(total(local, at), input.comm.name, name), input.comm.name)
    before = total(totals[: input.rank], 0).unsqueeze(at)
    return wrap(add(func(local, at), before).to(kind), input)


@rule(*named("glu"), any_order=True)
def glu(func: Any, input: PatchTensor, dim: int = -1) -> Any:
    if nth(dim, input.ndim) != input.row_layout.dim:
        return wrap(func(input.local, dim), input)
    values, gates = input.chunk(2, dim)
    return values * gates.sigmoid()
