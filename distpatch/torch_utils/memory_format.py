"""The order of a tensor's dims in memory: the same on all ranks, and the same as on one device."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distpatch.torch_utils.overridable import overridable
from distpatch.torch_utils.private import DisableTorchFunction, FakeMode, no_modes

Order = tuple[int, ...]  # dims as they stand in memory, innermost first
Strides = tuple[int, ...]


def memory_format(tensor: Tensor) -> torch.memory_format:
    """``channels_last`` (2-D or 3-D) where torch's kernels see it (``suggest_memory_format``), else contiguous.

    By strides alone: of one row, or none, the sizes do not tell, and all ranks must agree. A model that runs in
    another format than on one device has another speed and other rounding.
    """
    return _format(tensor.shape, tensor.stride())


def _format(shape: Sequence[int], strides: Sequence[int]) -> torch.memory_format:
    ndim = len(shape)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(ndim)
    if last is None or not 0 < strides[1] <= (strides[-1] or strides[1]):
        return torch.contiguous_format
    least, empty = strides[1] * shape[1], 0 in shape
    for d in (*range(ndim - 1, 1, -1), 0):  # torch gives some dims of an empty tensor no stride
        if (strides[d] < least and (strides[d] or not empty)) or (d == 0 and least == strides[1]):
            return torch.contiguous_format
        least = max(least, strides[d] * shape[d])
    return last


format_by_strides = lru_cache(maxsize=4096)(_format)  # where no size is a symbol


def memory_order(tensor: Tensor) -> Order:
    """The dims in the order of their strides, innermost first."""
    return order_by(tensor.shape, tensor.stride())


def order_by(shape: Sequence[int], strides: Sequence[int]) -> Order:
    """``memory_order`` of a tensor of this shape and these strides."""
    format = _format(shape, strides)
    if format is not torch.contiguous_format:
        return order_in(format, len(shape))
    return tuple(sorted(range(len(shape)), key=lambda d: (strides[d] or math.inf, -d)))


def order_in(format: torch.memory_format, ndim: int) -> Order:
    """The order of the dims of a dense tensor in this memory format."""
    if format is torch.contiguous_format:
        return tuple(reversed(range(ndim)))
    return (1, *range(ndim - 1, 1, -1), 0)


def dense_strides(shape: Sequence[int], order: Order) -> Strides:
    """The strides of a dense tensor whose dims are in this order in memory."""
    strides, step = [0] * len(shape), 1
    for d in order:
        strides[d], step = step, step * max(shape[d], 1)
    return tuple(strides)


def format_of(order: Order) -> torch.memory_format:
    """The memory format of a dense tensor whose dims are in this order; contiguous, where it has none."""
    if len(order) in {4, 5} and order == order_in(torch.channels_last, len(order)):
        return torch.channels_last if len(order) == 4 else torch.channels_last_3d
    return torch.contiguous_format


def same_order(one: Order, other: Order, shape: Sequence[int]) -> bool:
    """Whether both orders mean the same memory for this shape: dims of size 1 may be anywhere."""
    return one == other or [d for d in one if shape[d] > 1] == [d for d in other if shape[d] > 1]


@lru_cache(maxsize=4096)
def format_by_order(shape: Sequence[int], strides: Sequence[int]) -> torch.memory_format | None:
    """The memory format that has the dims of a tensor in the order that they have; None, where none has.

    Element-wise kernels keep the order alone. Of a view whose batch of one has any stride, torch says contiguous.
    """
    known = _format(shape, strides)
    if known is not torch.contiguous_format or torch.empty_strided(shape, strides, device="meta").is_contiguous():
        return known
    order = order_by(shape, strides)
    format = format_of(order)
    return format if same_order(order, order_in(format, len(shape)), shape) else None


@overridable
def in_memory_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """A dense copy of the tensor whose dims are in this order in memory, innermost first."""
    # No view: autograd lets nobody write to one that was made in a function of its own.
    dense = torch.empty_permuted(tensor.shape, tuple(order)[::-1], dtype=tensor.dtype, device=tensor.device)
    return dense.copy_(tensor)


# An argument that is a tensor, as torch is asked of it: (shape, strides, dtype, device, whether it requires gradients).
Kind = tuple[torch.Size, Strides, torch.dtype, torch.device, bool]
KindOf = Callable[[Tensor], Kind | None]  # None: nothing is known of it
_TORCH = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)


A_NUMBER = object()  # an argument that is a tensor of no dims


class _Unknown(Exception):
    """An argument that cannot be part of a cache key."""


def strides_on_one_device(
    func: Callable[..., Any], args: Any, kwargs: dict[str, Any], kind_of: KindOf, by_device: bool
) -> tuple[Strides, ...] | None:
    """The strides of each tensor that a function of torch returns on one device; None where nobody can tell.

    Which kernel computes a result, and so how it stands in memory, depends on sizes, strides, dtype, device and
    grad mode. So torch itself is asked, once for each of these, with tensors of the global shape that have no data.
    ``kind_of``: an argument, as it is on one device; ``by_device``: the kernel is another on each device, so
    that fake tensors are asked. Those of the meta device are exact about dims of size 1, by whose strides torch tells
    formats apart.
    """
    if not _is_of_torch(func):
        return None
    try:
        asked = _asked((args, {key: value for key, value in kwargs.items() if key != "generator"}), kind_of)
        return _strides(func, asked, _modes(), by_device)
    except (_Unknown, TypeError):  # something that cannot be hashed
        return None


@lru_cache(maxsize=1024)
def _is_of_torch(func: Any) -> bool:
    """Whether the function may be called a second time on tensors without data: a user's own may have side effects."""
    owner = getattr(func, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return False
    return isinstance(func, _TORCH) or (getattr(func, "__module__", None) or "").partition(".")[0] == "torch"


def _modes() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    cast = tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads(), cast


def _asked(value: Any, kind_of: KindOf) -> Any:
    """The arguments as a cache key."""
    if isinstance(value, Tensor):
        kind = kind_of(value)
        if kind is None:
            raise _Unknown
        return Tensor, kind
    if value is A_NUMBER:
        return Tensor, (torch.Size(), (), torch.float32, torch.device("meta"), False)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.memory_format, torch.device)):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return list if isinstance(value, list) else tuple, tuple(_asked(item, kind_of) for item in value)
    if isinstance(value, dict):
        return dict, tuple((key, _asked(item, kind_of)) for key, item in value.items())
    if isinstance(value, slice):
        return slice, tuple(_asked(part, kind_of) for part in (value.start, value.stop, value.step))
    if value is Ellipsis:
        return type(value), value
    raise _Unknown


def _answered(asked: Any, on_meta: bool) -> Any:
    """The arguments rebuilt from the cache key, as tensors without data."""
    kind, value = asked
    if kind is Tensor:
        shape, strides, dtype, device, grad = value
        return torch.empty_strided(
            shape, strides, dtype=dtype, device="meta" if on_meta else device, requires_grad=grad
        )
    if kind is dict:
        return {key: _answered(item, on_meta) for key, item in value}
    if kind is slice:
        return slice(*(_answered(part, on_meta) for part in value))
    if kind in {list, tuple}:
        return kind(_answered(item, on_meta) for item in value)
    return value


@lru_cache(maxsize=4096)
def _strides(
    func: Callable[..., Any], asked: Any, modes: tuple[Any, ...], by_device: bool
) -> tuple[Strides, ...] | None:
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:  # hidden from modes, and from hooks on what is saved for a backward pass: a result that is would keep itself
        with (
            DisableTorchFunction(),
            no_modes(),
            FakeMode() if by_device else nullcontext(),
            saved_tensors_hooks(lambda _: None, lambda nothing: nothing),
        ):
            args, kwargs = _answered(asked, not by_device)
            result = func(*args, **kwargs)
    except Exception:  # whatever a function says of tensors without data, it is not asked for its result
        return None
    finally:
        torch.set_autocast_cache_enabled(cached)
    results = result if isinstance(result, (tuple, list)) else [result]
    if not all(isinstance(t, Tensor) for t in results):
        return None
    return tuple(t.stride() for t in results)
