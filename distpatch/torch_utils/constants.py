"""Small tensors of constants that are made once: to make one costs kernels, and on a GPU a wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from distpatch.torch_utils.private import FakeTensor


def constant(numbers: Callable[..., Any], *given: Any, like: Tensor) -> Tensor:
    """``numbers(*given)``, one or nested lists, in the dtype and on the device of ``like``. Nobody may write to it."""
    if isinstance(like, FakeTensor):  # which meets none but fake ones of its own kind
        return like.new_empty(_shape(numbers(*given)))
    return made(numbers, given, like.dtype, like.device)


def forget() -> None:
    """Free them all."""
    made.cache_clear()
    blank.cache_clear()


def number(value: float) -> float:
    """For ``constant``: the number alone."""
    return value


@lru_cache(maxsize=4096)
def made(numbers: Callable[..., Any], given: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same, where none are fake: found without a call of Python."""
    with torch.inference_mode(False):  # it may meet what is recorded
        return torch.tensor(numbers(*given), dtype=dtype).to(device)


@lru_cache(maxsize=4096)
def blank(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one value alone, a view of a single element. Nobody may write to it."""
    return made(number, (value,), dtype, device).expand(shape)


def _shape(numbers: Any) -> list[int]:
    return [len(numbers), *_shape(numbers[0])] if isinstance(numbers, list) else []
