"""How the dims of a tensor stand in memory, told alike by all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dims as they stand in memory, innermost first."""
    if memory_format(tensor) is not torch.contiguous_format:
        return (1, *range(tensor.ndim - 1, 1, -1), 0)
    return tuple(sorted(range(tensor.ndim), key=lambda d: (tensor.stride(d) or math.inf, -d)))


def in_memory_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The same tensor, dense, its dims in memory in this order, innermost first."""
    # No view: autograd lets nobody write to one that was made in a function of its own.
    dense = torch.empty_permuted(tensor.shape, tuple(order)[::-1], dtype=tensor.dtype, device=tensor.device)
    return dense.copy_(tensor)
