"""Fake tensors of a plan have the strides and dtypes of real ones: by these kernels, and our rules, choose formats."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distpatch.planning.fake_run import Faking

# (shape, strides): dims of size 1 with strides that no format has
LAYOUTS = [
    ((1, 8, 1, 4), (8, 1, 32, 8)),
    ((1, 8, 1, 4), (32, 1, 32, 8)),
    ((1, 8, 1, 4), (32, 4, 4, 1)),
    ((1, 8, 2, 4), (8, 1, 32, 8)),
    ((2, 8, 3, 4), (96, 1, 32, 8)),
    ((1, 8, 3, 1), (24, 1, 8, 8)),
]

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda t: t + t,
    "sum with a factor": lambda t: torch.add(t, t, alpha=2),
    "sum with one column": lambda t: t + t[..., :1],
    "sum with contiguous": lambda t: t + torch.empty(t.shape),
    "times a number": lambda t: t * 2.0,
    "number over": lambda t: 1 / t,
    "number minus": lambda t: 1 - t,
    "power": lambda t: t**2,
    "remainder": lambda t: t % 2,
    "comparison": lambda t: t > 0,
    "comparison with another": lambda t: t > t[..., :1],
    "where": lambda t: torch.where(t > 0, t, 0.0),
    "exclusive or": lambda t: (t > 0) ^ (t > 1),
    "addcmul": lambda t: torch.addcmul(t, t, t),
    "maximum": lambda t: torch.maximum(t, t[..., :1]),
    "clamp": lambda t: t.clamp(0, 1),
    "SiLU": F.silu,
    "leaky ReLU": lambda t: F.leaky_relu(t, 0.1),
    "clone": torch.clone,
    "half": Tensor.half,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_strides(name: str) -> None:
    operation = OPERATIONS[name]
    for shape, strides in LAYOUTS:
        real = operation(torch.empty_strided(shape, strides))
        with Faking():
            fake = operation(torch.empty_strided(shape, strides))
        assert (fake.stride(), fake.dtype) == (real.stride(), real.dtype), (shape, strides)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2)], ids=str)
def test_dtypes_beside_numbers(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64, torch.int8, torch.int32, torch.bool):
        for number in (2, 2.5, True):
            for operation in (torch.add, torch.mul, torch.div, torch.eq, torch.bitwise_and):
                if operation is torch.bitwise_and and (dtype.is_floating_point or isinstance(number, float)):
                    continue
                real = operation(torch.ones(shape, dtype=dtype), number)
                with Faking():
                    fake = operation(torch.ones(shape, dtype=dtype), number)
                assert fake.dtype == real.dtype, (operation, dtype, number)
