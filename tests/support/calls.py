"""A small net that keeps or returns what a test asks for, and structures to hold tensors."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from distpatch.torch_utils.tree import tensors_in
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import run_ranks

SHAPE = (1, 3, 7, 5)
WORLDS = (2, 3)


class Net(nn.Module):
    """A convolution, and what ``then(net, y, *args)`` makes of it."""

    def __init__(self, then: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1).double()
        self.then = then
        self.cache: dict[str, Any] = {}
        self.history: deque[Any] = deque(maxlen=2)
        self.box = types.SimpleNamespace()
        self.layers = [nn.Identity()]  # not registered
        self.plain = torch.zeros(SHAPE).double()
        self.register_buffer("last", torch.zeros(SHAPE).double())
        self.register_buffer("later", None)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        image = x if isinstance(x, Tensor) else next(tensors_in(x))
        return self.then(self, self.conv(image), *args, **kwargs)


def ranked(net: nn.Module, body: Callable[[Any, int], Any], world: int, **options: Any) -> list[Any]:
    def rank_main(rank: int) -> Any:
        return body(distpatch.convert_model(copy.deepcopy(net), dist.group.WORLD, fallback="allow", **options), rank)

    return run_ranks(world, rank_main, keep=True)


def compare(results: list[Any], right: Any, label: str) -> None:
    for result in results:
        got, wanted = list(tensors_in(result)), list(tensors_in(right))
        assert len(got) == len(wanted), label
        for value, expected in zip(got, wanted, strict=True):
            assert type(value) is type(expected), f"{label}: {type(value)}"
            assert_same(value.detach(), expected.detach(), 1e-10, label)


# What a model returns, of any structure.
@dataclasses.dataclass(frozen=True)
class Frozen:
    y: Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    y: Tensor


def cyclic(y: Tensor) -> Any:
    parent = types.SimpleNamespace(y=y)
    parent.children = [types.SimpleNamespace(parent=parent, y=y), parent]
    return parent


def image() -> Tensor:
    return random_tensor(SHAPE, seed=1)
