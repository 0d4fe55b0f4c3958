"""How the dims of a tensor stand in memory: told alike by all ranks, and as one device would have it."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

Order = tuple[int, ...]  # dims as they stand in memory, innermost first


def memory_format(tensor: Tensor) -> torch.memory_format:
    """``channels_last`` (2-D or 3-D) where torch's kernels see it (``suggest_memory_format``), else contiguous.

    By strides alone: of one row, or none, the sizes do not tell, and all ranks must agree. A model that runs in
    another format than on one device has another speed and other rounding.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    strides = tensor.stride()
    if last is None or not 0 < strides[1] <= (strides[-1] or strides[1]):
        return torch.contiguous_format
    least, empty = strides[1] * tensor.shape[1], tensor.numel() == 0
    for d in (*range(tensor.ndim - 1, 1, -1), 0):  # torch gives some dims of an empty tensor no stride
        if (strides[d] < least and (strides[d] or not empty)) or (d == 0 and least == strides[1]):
            return torch.contiguous_format
        least = max(least, strides[d] * tensor.shape[d])
    return last


def memory_order(tensor: Tensor) -> Order:
    """The dims as they stand in memory, innermost first."""
    if memory_format(tensor) is not torch.contiguous_format:
        return order_in(torch.channels_last, tensor.ndim)
    return tuple(sorted(range(tensor.ndim), key=lambda d: (tensor.stride(d) or math.inf, -d)))


def order_in(format: torch.memory_format, ndim: int) -> Order:
    """The order of the dims of a dense tensor in this format."""
    if format is torch.contiguous_format:
        return tuple(reversed(range(ndim)))
    return (1, *range(ndim - 1, 1, -1), 0)


def format_of(order: Order) -> torch.memory_format:
    """The memory format of a dense tensor whose dims stand in this order; contiguous, where it has none."""
    if len(order) in {4, 5} and order == order_in(torch.channels_last, len(order)):
        return torch.channels_last if len(order) == 4 else torch.channels_last_3d
    return torch.contiguous_format


def same_order(one: Order, other: Order, shape: Sequence[int]) -> bool:
    """Whether elements of a tensor of this shape stand alike; dims of size 1 may stand anywhere."""
    return one == other or [d for d in one if shape[d] > 1] == [d for d in other if shape[d] > 1]


def in_memory_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The same tensor, dense, its dims in memory in this order, innermost first."""
    # No view: autograd lets nobody write to one that was made in a function of its own.
    dense = torch.empty_permuted(tensor.shape, tuple(order)[::-1], dtype=tensor.dtype, device=tensor.device)
    return dense.copy_(tensor)


# What torch is asked: an argument that is a tensor, as it is on one device: (shape, strides, dtype, device, grad).
Kind = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device, bool]
_TORCH = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)


class _Unknown(Exception):
    """An argument of which nothing is known that could be remembered."""


def orders_on_one_device(
    func: Callable[..., Any], args: Any, kwargs: dict[str, Any], strides_of: Callable[[Tensor], Sequence[int]]
) -> tuple[Order, ...] | None:
    """How each tensor that a function of torch returns stands in memory on one device; None where nobody can tell.

    Which kernel computes a result, and so how it stands in memory, depends on sizes, strides, dtype, device and
    grad mode. So torch itself is asked, once for each of these, with tensors of the global shape that have no data.
    ``strides_of``: of an argument, as it is on one device.
    """
    if not _is_of_torch(func):
        return None
    try:
        asked = _asked((args, {key: value for key, value in kwargs.items() if key != "generator"}), strides_of)
        return _orders(func, asked, _modes())
    except (_Unknown, TypeError):  # something that cannot be hashed
        return None


@lru_cache(maxsize=1024)
def _is_of_torch(func: Any) -> bool:
    """Whether it can be called once more, to see what it does: a user's function might do something else."""
    owner = getattr(func, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return False
    return isinstance(func, _TORCH) or (getattr(func, "__module__", None) or "").partition(".")[0] == "torch"


def _modes() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    cast = tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads(), cast


def _asked(value: Any, strides_of: Callable[[Tensor], Sequence[int]]) -> Any:
    """The arguments as something to be remembered; a number with a point as what it is, not how much."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.device.type == "meta":
            raise _Unknown
        grad = torch.is_grad_enabled() and value.requires_grad  # which rows that wait have not
        return Tensor, (value.shape, tuple(strides_of(value)), value.dtype, value.device, grad)
    if value is None or isinstance(value, (bool, int, str, torch.dtype, torch.memory_format, torch.device)):
        return type(value), value
    if isinstance(value, float):
        return float, None
    if isinstance(value, (list, tuple)):
        return list if isinstance(value, list) else tuple, tuple(_asked(item, strides_of) for item in value)
    if isinstance(value, dict):
        return dict, tuple((key, _asked(item, strides_of)) for key, item in value.items())
    if isinstance(value, slice):
        return slice, tuple(_asked(part, strides_of) for part in (value.start, value.stop, value.step))
    if value is Ellipsis:
        return type(value), value
    raise _Unknown


def _answered(asked: Any) -> Any:
    """The arguments again, tensors without data."""
    kind, value = asked
    if kind is Tensor:
        shape, strides, dtype, device, grad = value
        return torch.empty_strided(shape, strides, dtype=dtype, device=device, requires_grad=grad)
    if kind is float:
        return 0.5
    if kind is dict:
        return {key: _answered(item) for key, item in value}
    if kind is slice:
        return slice(*map(_answered, value))
    if kind in {list, tuple}:
        return kind(map(_answered, value))
    return value


@lru_cache(maxsize=4096)
def _orders(func: Callable[..., Any], asked: Any, modes: tuple[Any, ...]) -> tuple[Order, ...] | None:
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:  # nobody else sees these calls: no mode, no hook on what is saved for a backward pass
        with (
            torch._C.DisableTorchFunction(),
            _disable_current_modes(),
            FakeTensorMode(),
            saved_tensors_hooks(lambda t: t, lambda t: t),
        ):
            args, kwargs = _answered(asked)
            result = func(*args, **kwargs)
    except Exception:  # whatever a function says of tensors without data, it is not asked for its result
        return None
    finally:
        torch.set_autocast_cache_enabled(cached)
    results = result if isinstance(result, (tuple, list)) else [result]
    if not all(isinstance(t, Tensor) for t in results):
        return None
    return tuple(memory_order(t) for t in results)
