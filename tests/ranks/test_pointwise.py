"""Element-wise functions, in place and out of place, and broadcasting between layouts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.oracle import H, case

X = (2, 3, H, 5)
NAMES = "abs ceil cos erf exp floor frac neg reciprocal relu round sigmoid sign sin square tanh trunc".split()
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a.abs() ** b,
    "//": lambda a, b: (a.detach() // b.detach()) * a,
    "%": lambda a, b: a % b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "maximum": torch.maximum,
    "atan2": torch.atan2,
}


def with_number(op: Callable[[Any, Any], Any], x: Tensor) -> Tensor:
    return op(x, torch.tensor(2.5))


def in_place(change: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """The function that changes a copy; what the change returns is dropped."""

    def run(x: Tensor) -> Tensor:
        y = x * 1
        change(y)
        return y

    return run


def add_into(x: Tensor, other: Tensor) -> Tensor:
    y = x * 2
    alias = y
    y += other
    assert alias is y
    return alias


CASES = {
    **{name: case(getattr(torch, name), X, heights=(7,), worlds=(3,)) for name in NAMES},
    **{f"{name} of two": case(op, X, X, sharded=2) for name, op in OPERATORS.items()},
    **{f"{name} 2.5": case(partial(with_number, op), X, heights=(3,), worlds=(2,)) for name, op in OPERATORS.items()},
    "number first": case(lambda x: 1.5 - 2 / (3 + x.exp()), X),
    "silu": case(F.silu, X),
    "gelu": case(lambda x: F.gelu(x, approximate="tanh"), X),
    "leaky_relu": case(lambda x: F.leaky_relu(x, 0.1), X),
    "softplus": case(F.softplus, X),
    "clamp": case(lambda x: x.clamp(-0.5, max=0.7), X),
    "clamp by tensors": case(lambda x, a: torch.clamp(x, a, a + 1), X, (3, 1, 1)),
    "tanh(x/3)*3": case(lambda x: torch.tanh(x / 3) * 3, X),
    "where": case(lambda x, y: torch.where(x > 0, x, y), X, X, sharded=2),
    "where plain": case(lambda x, y: torch.where(y > 0, x, 0.0), X, X),
    "masked_fill": case(lambda x: x.masked_fill(x > 0, -1.0), X),
    "lerp": case(lambda x, y: torch.lerp(x, y, 0.3), X, X, sharded=2),
    "addcmul": case(lambda x, y, z: torch.addcmul(x, y, z, value=2), X, X, X, sharded=3),
    "float and back": case(lambda x: x.float().double() + x.to(torch.float32).to(x.dtype), X),
    "type_as": case(lambda x: (x > 0).type_as(x) * x, X),
    "detach": case(lambda x: x.detach() * x, X),
    "clone": case(lambda x: x.clone() + x.contiguous(), X),
    "to channels_last": case(lambda x: x.contiguous(memory_format=torch.channels_last) * 2, X),
    "relu in place": case(in_place(lambda y: F.relu(y, inplace=True)), X),
    "relu_": case(in_place(lambda y: y.relu_()), X),
    "mul_ add_": case(in_place(lambda y: y.mul_(3).add_(y, alpha=0.5)), X),
    "silu in place": case(in_place(lambda y: F.silu(y, inplace=True)), X),
    "clamp_": case(in_place(lambda y: y.clamp_(-0.3, 0.4)), X),
    "+= sharded": case(add_into, X, X, sharded=2),
    "+= plain": case(add_into, X, X),
    "+= column": case(add_into, X, (1, 3, 1, 1)),
    "copy_": case(lambda x, y: (x * 1).copy_(y), X, X, sharded=2),
    "fill_": case(in_place(lambda y: y.fill_(2.0)), X, heights=(3,)),
    "zero_": case(in_place(lambda y: y.zero_()), X, heights=(3,)),
    # A plain tensor is replicated: sliced where it is as tall as the image, else used as it is.
    "plain, full height": case(torch.mul, X, (1, 1, H, 5)),
    "plain, full height, without batch": case(torch.mul, X, (3, H, 1)),
    "plain, full height, in front": case(lambda x, y: y - x, X, (H, 5)),
    "plain, height 1": case(torch.mul, X, (2, 3, 1, 5)),
    "plain, a row": case(torch.add, X, (5,)),
    "plain, a channel": case(torch.mul, X, (3, 1, 1)),
    "plain, a number": case(torch.mul, X, ()),
    "plain, wider": case(torch.mul, (2, 1, H, 1), (1, 3, 1, 5)),
    "plain, more dims": case(torch.mul, X, (4, 1, 1, 1, 1)),
    "plain, taller": case(lambda x, y: x[:, :, :1] + y, X, X),
    "sharded of height 1, plain taller": case(torch.add, X, (2, 3, 4, 5), heights=(1,)),
    "sharded, fewer dims": case(torch.mul, (3, H, 1), X, sharded=2),
    "sharded, height 1": case(lambda x, y: x * y[:, :, -1:], X, X, sharded=2),
    "scale and shift": case(lambda x, s, b: x * (1 + s[:, :, None, None]) + b[:, :, None, None], X, (2, 3), (2, 3)),
    "width": case(torch.mul, (2, 3, 5, H), (5, 1), dim=-1),
    "width, full": case(torch.mul, (2, 3, 5, H), (5, H), dim=-1),
    "two layouts thrice": case(lambda x, y: (x + y) * (y - x) + y, X, X, sharded=2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pointwise(case: Callable[[], None]) -> None:
    case()
