"""Inputs of a case as functions of its number of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.oracle import H

X = (2, 3, H, 5)
MANY = (7, 3)


def numbers(*shape: int, below: int) -> Callable[[int], Tensor]:
    """An input of whole numbers; H stands for the rows."""

    def make(rows: int) -> Tensor:
        sizes = tuple(rows if n == H else n for n in shape)
        return torch.randint(below, sizes, generator=torch.Generator().manual_seed(5))

    return make


def anywhere(*shape: int) -> Callable[[int], Tensor]:
    """Numbers of rows."""
    return lambda rows: numbers(*shape, below=rows)(rows)


def mask(*shape: int) -> Callable[[int], Tensor]:
    draw = numbers(*shape, below=2)
    return lambda rows: draw(rows).bool()
