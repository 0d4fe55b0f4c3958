"""Functions of torch in terms of others that have rules. Nothing here knows of ranks or rows.

Where torch itself has the function in Python, its own body is run (``inlined``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.rules.core.registry import named, nth, rule
from distpatch.torch_utils.private import inlined, nn_builtins, variable_functions

_AT_LEAST = ("atleast_1d", "atleast_2d", "atleast_3d")
_ALONG = {"hstack": 1, "vstack": 0, "row_stack": 0, "dstack": 2, "column_stack": 1}


def composite(*funcs: Any, **properties: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what stands for these functions; it takes the function and its arguments.

    ``any_order=False``: rows in blocks are brought in order first, where it writes to a copy of an argument.
    """
    return rule(*funcs, **{"any_order": True, **properties})


def _run(body: Callable[..., Any], func: Any, *args: Any, **kwargs: Any) -> Any:
    return body(*args, **kwargs)


for _func in (
    *(F.normalize, F.gumbel_softmax, F.softmin, F.multi_head_attention_forward),
    *named("__contains__", "__reversed__"),
    *(F.lp_pool1d, F.lp_pool2d, F.lp_pool3d),
):
    composite(_func)(partial(_run, inlined(_func)))


_WRITES = {"any_order": False}
# Those that are one expression, and what is known of them.
_EXPRESSIONS: list[tuple[list[Any], Callable[..., Any], dict[str, bool]]] = [
    (named("ravel"), lambda func, input: input.reshape(-1), {"view": True}),
    (named("view_as", "reshape_as"), lambda func, input, other: input.reshape(other.shape), {"view": True}),
    (named("expand_as"), lambda func, input, other: input.expand(other.shape), {"view": True}),
    ([torch.Tensor.__iter__], lambda func, input: iter(input.unbind(0)), {}),
    (named("select_scatter"), lambda func, input, src, dim, index: _with_part(input, src, dim, index), _WRITES),
    (
        named("slice_scatter"),
        lambda func, input, src, dim=0, start=None, end=None, step=1: _with_part(
            input, src, dim, slice(start, end, step)
        ),
        _WRITES,
    ),
    ([torch.Tensor.__rmatmul__], lambda func, self, other: torch.matmul(other, self), {}),
    (
        [F.pairwise_distance],
        lambda func, x1, x2, p=2.0, eps=1e-6, keepdim=False: torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim),
        {},
    ),
    (named("dist"), lambda func, input, other, p=2: torch.linalg.vector_norm(input - other, p), {}),
    (named("is_same_size"), lambda func, input, other: input.shape == other.shape, {}),
    (named("equal"), lambda func, input, other: input.shape == other.shape and bool((input == other).all()), {}),
    (
        named("allclose"),
        lambda func, input, other, *args, **kwargs: bool(torch.isclose(input, other, *args, **kwargs).all()),
        {},
    ),
]
for _funcs, _expression, _known in _EXPRESSIONS:
    composite(*_funcs, **_known)(_expression)


# Views and shapes.


@composite(*named("broadcast_tensors"), view=True)
def broadcast_tensors(func: Any, *tensors: Any) -> tuple[Tensor, ...]:
    given = tensors[0] if len(tensors) == 1 and not isinstance(tensors[0], Tensor) else tensors
    shape = torch.broadcast_shapes(*(t.shape for t in given))
    return tuple(t.expand(shape) for t in given)


@composite(*named(*_AT_LEAST), *(getattr(variable_functions, name) for name in _AT_LEAST), view=True)
def at_least(func: Any, *tensors: Any) -> Any:
    """Dims of size 1 are added to tensors of fewer dims; one tensor gives one, several a tuple."""
    several = len(tensors) > 1 or not isinstance(tensors[0], Tensor)
    least = int(func.__name__[-2])
    results = tuple(_with_dims(t, least) for t in (tensors if len(tensors) > 1 or not several else tensors[0]))
    return results if several else results[0]


def _with_dims(tensor: Tensor, least: int) -> Tensor:
    if tensor.ndim == 0:
        tensor = tensor.reshape(1)
    if tensor.ndim == 1 and least > 1:
        tensor = tensor.unsqueeze(0)
    return tensor.unsqueeze(-1) if tensor.ndim == 2 and least > 2 else tensor


@composite(*named("hsplit", "vsplit", "dsplit"), view=True)
def split_along(func: Any, input: Tensor, *sizes: Any, **kwargs: Any) -> Any:
    (given,) = sizes or kwargs.values()
    at = {"v": 0, "h": min(1, input.ndim - 1), "d": 2}[func.__name__[0]]
    if isinstance(given, int) and input.shape[at] % given:
        raise RuntimeError(f"{func.__name__}: {input.shape[at]} is not divisible by {given}")
    return input.tensor_split(given, at)


@composite(*named(*_ALONG))
def stack_along(func: Any, tensors: Sequence[Tensor]) -> Any:
    """Concatenation along the first, second or third dim of tensors that have it."""
    at = _ALONG[func.__name__]
    return torch.cat(tuple(tensors), at) if all(t.ndim > max(at, 1) for t in tensors) else NotImplemented


# Rows in another arrangement.


@composite(*named("rot90"))
def rot90(func: Any, input: Tensor, k: int = 1, dims: Sequence[int] = (0, 1)) -> Tensor:
    one, other = dims
    if k % 4 == 0:
        return input.clone()
    if k % 4 == 2:
        return input.flip(one, other)
    return input.flip(other if k % 4 == 1 else one).transpose(one, other)


@composite(torch.fft.fftshift, torch.fft.ifftshift)
def shift(func: Any, input: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    dims = range(input.ndim) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    more = func is torch.fft.ifftshift
    return torch.roll(input, [(input.shape[d] + more) // 2 for d in dims], tuple(dims))


@composite(*named("diff"))
def diff(func: Any, input: Tensor, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Tensor:
    if n == 0:
        return input
    parts = [part for part in (prepend, input, append) if part is not None]
    x = torch.cat(parts, dim) if len(parts) > 1 else input
    for _ in range(min(n, x.shape[dim])):
        one, other = x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, 0, x.shape[dim] - 1)
        x = one ^ other if x.dtype == torch.bool else one - other
    return x


@composite(*named("take_along_dim"))
def take_along_dim(func: Any, input: Tensor, indices: Tensor, dim: int | None = None) -> Any:
    """``gather`` after broadcasting all other dims."""
    if dim is None:
        return NotImplemented
    at = nth(dim, input.ndim)
    indices = torch.where(indices < 0, indices + input.shape[at], indices)
    one, other = list(input.shape), list(indices.shape)
    one[at] = other[at] = 1
    shape = torch.broadcast_shapes(one, other)
    source = input.expand(*shape[:at], input.shape[at], *shape[at + 1 :])
    return torch.gather(source, at, indices.expand(*shape[:at], indices.shape[at], *shape[at + 1 :]))


def _with_part(input: Tensor, part: Tensor, dim: int, place: Any) -> Tensor:
    """A copy of the input with one part of it replaced."""
    result = input.clone()
    result[(slice(None),) * nth(dim, input.ndim) + (place,)] = part
    return result


# Products, distances, norms.


@composite(*named("addmm", "addbmm", "baddbmm", "addmv", "addr"))
def add_product(func: Any, input: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """``beta * input + alpha * (left @ right)``; with ``beta=0`` the input is not read."""
    name = func.__name__
    if alpha != 1:
        left = left * alpha
    if name == "addr":
        product = torch.outer(left, right)
    else:
        product = torch.einsum("bnk,bkm->nm", left, right) if name == "addbmm" else torch.matmul(left, right)
    if beta == 0:
        return product
    return (product + (input if beta == 1 else input * beta)).to(product.dtype)


@composite(nn_builtins.pad_sequence)
def pad_sequence(
    func: Any,
    sequences: Sequence[Tensor],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> Any:
    """Each padded to the longest, and stacked."""
    longest = max(len(sequence) for sequence in sequences)

    def padded(sequence: Tensor) -> Tensor:
        missing = longest - len(sequence)
        sides = [0, missing] if padding_side == "right" else [missing, 0]
        return F.pad(sequence, [0, 0] * (sequence.ndim - 1) + sides, value=padding_value) if missing else sequence

    return torch.stack([padded(sequence) for sequence in sequences], 0 if batch_first else 1)


@composite(F.cosine_similarity)
def cosine_similarity(func: Any, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Any:
    ndim = max(x1.ndim, x2.ndim)
    at = nth(dim, ndim) - ndim
    if x1.shape[at:][:1] != x2.shape[at:][:1]:  # norms are of what the operands broadcast to
        x1, x2 = torch.broadcast_tensors(x1, x2)
    units = [x / torch.linalg.vector_norm(x, 2, at, True).clamp_min(eps) for x in (x1, x2)]
    return (units[0] * units[1]).sum(at)


@composite(*named("norm"), asks_if_empty=True)
def norm(
    func: Any, input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> Any:
    if p == "nuc" or out is not None:
        return NotImplemented
    return torch.linalg.vector_norm(input, 2 if p in {"fro", None} else p, dim, keepdim, dtype=dtype)


@composite(torch.linalg.vecdot)
def vecdot(func: Any, x: Tensor, y: Tensor, *, dim: int = -1) -> Any:
    total = (x.conj() * y).sum(dim)
    if torch.is_autocast_enabled(x.device.type):
        total = total.to(func(*(torch.zeros(1, dtype=t.dtype, device=t.device) for t in (x, y))).dtype)
    return total


@composite(torch.linalg.norm, asks_if_empty=True)
def linalg_norm(func: Any, A: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, **dtype: Any) -> Any:
    """A vector's norm, or a matrix's."""
    if dim is None and ord is not None and A.ndim == 2:
        dim = (0, 1)
    if ord is not None and isinstance(dim, (tuple, list)) and len(dim) == 2:
        return torch.linalg.matrix_norm(A, ord, dim, keepdim, **dtype)
    return torch.linalg.vector_norm(A, 2 if ord in {None, "fro"} else ord, dim, keepdim, **dtype)


@composite(torch.linalg.matrix_norm, asks_if_empty=True)
def matrix_norm(
    func: Any, A: Tensor, ord: Any = "fro", dim: Sequence[int] = (-2, -1), keepdim: bool = False, **dtype: Any
) -> Any:
    """Of Frobenius, or a sum of columns; singular values need all."""
    if ord == "fro":
        return torch.linalg.vector_norm(A, 2, dim, keepdim, **dtype)
    if ord not in {1, -1, math.inf, -math.inf}:
        return NotImplemented
    row, column = (nth(d, A.ndim) for d in dim)
    added, compared = (row, column) if abs(ord) == 1 else (column, row)
    sums = torch.linalg.vector_norm(A, 1, added, True, **dtype)
    result = sums.amax(compared, True) if ord > 0 else sums.amin(compared, True)
    return result if keepdim else result.squeeze((row, column))


@composite(*named("aminmax"), asks_if_empty=True)
def aminmax(func: Any, input: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    dims = () if dim is None else (dim,)
    return torch.return_types.aminmax((input.amin(dims, keepdim), input.amax(dims, keepdim)))
