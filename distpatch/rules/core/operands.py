"""Operands of a rule: replicated, brought to the same rows; and how a rule reads its arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.comm import collectives
from distpatch.comm.dtensors import is_dtensor, refusal
from distpatch.errors import LayoutError, UnsupportedOpError
from distpatch.rules.core.redistribution import (
    gather_partial,
    redistribute,
)
from distpatch.rules.core.registry import nth
from distpatch.rules.core.wrapping import (
    wrap,
)
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
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


PLAIN = (Tensor, torch.nn.Parameter)


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


def whole_operand(tensor: Tensor, like: PatchTensor, func: Any) -> Tensor:
    """All of an operand that this rank's rows are combined with; its gradient is summed over ranks."""
    return gather_partial(tensor, func) if isinstance(tensor, PatchTensor) else replicated_operand(tensor, like)


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
