"""How results stand in memory: as on one device, not as the kernel leaves them that computes one rank's rows.

Random numbers are drawn in the order in which a tensor stands in memory, and convolutions take their kernel by it.
Of one row or none, strides do not tell that order; and which kernel convolves, with which format, depends on how
many rows there are. In both cases torch is asked what it does with the whole tensor (formats.py), which it says once for each kind of call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.formats import Order, format_of, in_memory_order, order_in, orders_on_one_device, same_order
from distpatch.rules.registry import named, order_of
from distpatch.rules.views import strides_of
from distpatch.tensor import RULES, PatchCopy, PatchTensor


# Their results are channels-last where the input is, and else contiguous: not what torch says of tensors without data.
_BY_FORMAT = frozenset((F.batch_norm, F.pad, *named("roll", "channel_shuffle")))


def as_on_one_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """The results of a call, each put or noted in the order in which one device has it."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    if torch.compiler.is_compiling() or not all(isinstance(t, PatchTensor) for t in results):
        return result
    for x, order in zip(results, _orders(func, args, kwargs) or ()):
        if x.ndim == len(order) and not any(x is arg for arg in args):
            for each in (x, x.plain) if isinstance(x, PatchCopy) else (x,):
                _settle(each, order)
    return result


def _orders(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Order] | None:
    x = args[0] if args else None
    if func in _BY_FORMAT and isinstance(x, PatchTensor) and not _is_constant(func, args, kwargs):
        return [order_in(format_of(order_of(x)), x.ndim)]
    return orders_on_one_device(func, args, kwargs, _strides_of)


def _is_constant(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return func is F.pad and (args[2] if len(args) > 2 else kwargs.get("mode", "constant")) == "constant"


def _settle(x: PatchTensor, order: Order) -> None:
    if x.rows.is_tiny:
        x.order = order
    elif not same_order(order_of(x), order, x.shape):
        format = format_of(order)
        if x.waits:
            x.recipe.format = format
        else:
            is_format = order == order_in(format, x.ndim)
            x.local = x.local.contiguous(memory_format=format) if is_format else in_memory_order(x.local, order)


def _strides_of(tensor: Tensor) -> Sequence[int]:
    return strides_of(tensor) if isinstance(tensor, PatchTensor) else tensor.stride()


_CONVOLUTIONS = [f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)]
RULES.of_many_kernels |= set(named(*_CONVOLUTIONS, "interpolate", "instance_norm", "softmax", "log_softmax"))
RULES.as_on_one_device = as_on_one_device
