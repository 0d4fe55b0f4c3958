"""Plain tensors that sharded values are written to: their rows go where the values are, and nothing is gathered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch import PatchTensor
from tests.support.oracle import H, case

X = (2, 3, H, 5)
FEW = {"heights": (7, 1), "worlds": (2, 3)}


def stays_sharded(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        out = fn(*tensors)
        assert isinstance(out, PatchTensor) == isinstance(tensors[0], PatchTensor)
        return out

    return run


def labels(classes: int, *shape: int) -> Callable[[int], Tensor]:
    def make(rows: int) -> Tensor:
        size = tuple(rows if n == H else n for n in shape)
        return torch.randint(classes, size, generator=torch.Generator().manual_seed(3))

    return make


def zeros(x: Tensor, channels: int | None = None) -> Tensor:
    return torch.zeros(x.shape[0], channels or x.shape[1], *x.shape[2:], dtype=torch.float64)


def accumulated(x: Tensor) -> Tensor:
    total = zeros(x)
    for scale in (1, 2):
        total += scale * x
    return total


def chosen(x: Tensor) -> Tensor:
    out = zeros(x)
    out[x > 0] = 2.0
    return out * x


def read_before(x: Tensor) -> Tensor:
    """Somebody else holds its memory: it stays plain, and right."""
    out = zeros(x)
    other = out[:, :1]
    out.copy_(x)
    return out + other


CASES = {
    "one-hot by scatter_": case(stays_sharded(lambda i: zeros(i, 4).scatter_(1, i, 1)), labels(4, 2, 1, H, 5), **FEW),
    "one-hot by scatter_ of ones": case(
        stays_sharded(lambda i: zeros(i, 4).scatter_(1, i, torch.ones(i.shape, dtype=torch.float64))), labels(4, 2, 1, H, 5), **FEW
    ),
    "one-hot by scatter": case(stays_sharded(lambda i: torch.scatter(zeros(i, 4), 1, i, 1.0)), labels(4, 2, 1, H, 5), **FEW),
    "one_hot": case(stays_sharded(lambda i: F.one_hot(i, 4)), labels(4, 2, H, 5), **FEW),
    "one_hot of unknown": case(stays_sharded(lambda i: F.one_hot(i)), labels(4, 2, H, 5), **FEW),
    "a histogram by scatter_add_": case(
        stays_sharded(lambda i, x: zeros(i, 4).scatter_add_(1, i, x)), labels(4, 2, 3, H, 5), X, sharded=2, **FEW
    ),
    "scatter_add of a source": case(
        stays_sharded(lambda x, i: torch.scatter_add(zeros(x, 4), 1, i, x)), X, labels(4, 2, 3, H, 5), sharded=2, **FEW
    ),
    "scatter_reduce_": case(
        stays_sharded(lambda x, i: zeros(x, 4).scatter_reduce_(1, i, x.detach(), "amax")), X, labels(4, 2, 3, H, 5), sharded=2, **FEW
    ),
    "index_add_": case(stays_sharded(lambda x: zeros(x, 4).index_add_(1, torch.tensor([3, 0, 3]), x)), X, **FEW),
    "index_copy_": case(stays_sharded(lambda x: zeros(x, 4).index_copy_(1, torch.tensor([3, 0, 1]), x)), X, **FEW),
    "copy_": case(stays_sharded(lambda x: zeros(x).copy_(x)), X, **FEW),
    "+=": case(stays_sharded(accumulated), X, **FEW),
    "add_ of another layout": case(stays_sharded(lambda x, y: zeros(x).add_(x).add_(y, alpha=2)), X, X, sharded=2, **FEW),
    "masked_fill_": case(stays_sharded(lambda x: zeros(x).masked_fill_(x > 0, 3.0) * x), X, **FEW),
    "a mask of rows": case(stays_sharded(chosen), X, **FEW),
    "addcmul_": case(stays_sharded(lambda x: zeros(x).addcmul_(x, x)), X, **FEW),
    "add, out=": case(stays_sharded(lambda x: torch.add(x.detach(), 1, out=zeros(x))), X, **FEW),
    "where, out=": case(
        stays_sharded(lambda x: torch.where(x.detach() > 0, x.detach(), x.detach() * 2, out=zeros(x))), X, **FEW
    ),
    "seen by another": case(read_before, X, **FEW),
    "of another shape": case(lambda x: zeros(x).add_(x[:, :1]), X, **FEW),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fresh_tensors(case: Callable[[], None]) -> None:
    case()
