"""Rows of the neighbours that come with the moments of a norm: the convolution behind it fetches none, and is exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from distpatch.comm import moments_exchange
from distpatch.lazy import recipe
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

X, WIDE, KERNEL = (2, 4, H, 5), (2, 8, H, 5), (4, 4, 3, 3)


def normed(x: Tensor) -> Tensor:
    return F.group_norm(x, 2)


def convolved(x: Tensor, w: Tensor, **how: Any) -> Tensor:
    return F.conv2d(x, w, padding=how.pop("padding", 1), **how)


def adaptive(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """As the residual blocks of diffusion models, which scale by the time step."""
    return convolved(F.silu(normed(x) * (1 + scale[:, :, None, None]) + 0.5), w)


def branches(x: Tensor, w: Tensor) -> Tensor:
    y = F.gelu(normed(x))
    return convolved(y, w) + convolved(y.sigmoid(), w) + convolved(y, w[:, :, 1:2], padding=(0, 1)) + y


def sum_of_two(x: Tensor, w: Tensor) -> Tensor:
    return convolved(normed(x) + F.instance_norm(x), w)


def with_rows_of_no_norm(x: Tensor, w: Tensor) -> Tensor:
    return convolved(normed(x) + x, w)


def written(write: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """What is written between the norm and the convolution reaches the neighbours, whoever owns it."""

    def of(x: Tensor, w: Tensor) -> Tensor:
        y = F.silu(normed(x))
        y = y.clone() if torch.is_grad_enabled() else y
        write(y)
        return convolved(y, w)

    return of


def write_to_a_view(y: Tensor) -> None:
    y[:, 1:3].mul_(2)


def write_a_row(y: Tensor, row: int = 0) -> None:
    y[:, :, row] = 1.0


def write_through_out(y: Tensor) -> None:
    torch.mul(y, 3.0, out=y)


def of_a_view(x: Tensor, w: Tensor) -> Tensor:
    """A view of what a norm made has other rows than its neighbours' have."""
    y = normed(x)
    return convolved(y.flip(2), w) + convolved(y[:, :, 1:], w).mean() + convolved(y.roll(1, 2), w)


# ``p2p``: rounds of rows at most; of a norm one, of the convolutions behind it none.
CASES = {
    "convolution": case(lambda x, w: convolved(normed(x), w), X, KERNEL),
    "activation": case(lambda x, w: convolved(F.silu(normed(x)), w), X, KERNEL),
    "several": case(lambda x, w: convolved((normed(x) * 2 + 1).relu().float().double(), w), X, KERNEL),
    "in place": case(lambda x, w: convolved(F.relu(normed(x).mul_(2).add_(0.1), inplace=True), w), X, KERNEL),
    "instance norm": case(lambda x, w: convolved(F.leaky_relu(F.instance_norm(x), 0.1), w), X, KERNEL),
    "scaled by a vector": case(adaptive, X, KERNEL, (2, 4)),
    "branches": case(branches, X, KERNEL),
    "sum of two norms": case(sum_of_two, X, KERNEL),
    "beside rows of no norm": case(with_rows_of_no_norm, X, KERNEL),
    "written to a view": case(written(write_to_a_view), X, KERNEL),
    "written to the first row": case(written(write_a_row), X, KERNEL),
    "written to the last row": case(written(partial(write_a_row, row=-1)), X, KERNEL),
    "views": case(of_a_view, X, KERNEL, heights=(7, 12)),
    "stride 2": case(lambda x, w: convolved(normed(x), w, stride=2), X, KERNEL, heights=(8, 9, 3)),
    "a wider kernel": case(lambda x, w: convolved(normed(x), w, padding=2), X, (4, 4, 5, 5)),
    "dilation": case(lambda x, w: convolved(normed(x), w, padding=2, dilation=2), X, KERNEL),
    "pooling": case(lambda x: F.max_pool2d(normed(x), 3, 1, 1), X),
    "a pad of another kind": case(lambda x, w: F.conv2d(F.pad(normed(x), (1, 1, 1, 1), mode="reflect"), w), X, KERNEL,
                                  heights=(7, 4)),
    "grouped, channels last": case(lambda x, w: convolved(normed(x), w, groups=2), WIDE, (4, 4, 3, 3), channels_last=True),
    "volumes": case(lambda x, w: F.conv3d(F.silu(normed(x)), w, padding=1), (1, 4, 3, H, 5), (4, 4, 3, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("deferred", [False, True], ids=["now", "deferred"])
@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if deferred:
        monkeypatch.setattr(recipe, "LEAST_BYTES", 0)
    CASES[name]()


def rounds_of(fn: Callable[..., Tensor], *tensors: Tensor, world: int = 3, inference: bool = False) -> list[int]:
    """Rounds that each rank waits for; its result is compared with one device's."""
    with torch.no_grad():
        right = fn(*tensors)

    def body(rank: int) -> int:
        with torch.inference_mode(inference), torch.no_grad(), distpatch.trace() as t:
            result = fn(distpatch.shard(tensors[0], dist.group.WORLD), *tensors[1:])
            rounds = t.rounds
            assert torch.allclose(distpatch.gather(result), right, rtol=1e-10, atol=1e-10)
        return rounds

    return run_ranks(world, body)


ROUNDS = {
    "one after the other": (lambda x, w: convolved(F.silu(normed(convolved(F.silu(normed(x)), w))), w), 2),
    "in place": (lambda x, w: convolved(F.relu(normed(x), inplace=True), w), 1),
    "branches": (branches, 1),
    "written": (written(write_a_row), 2),
    "written by out=": (written(write_through_out), 2),
    "a wider kernel": (lambda x, w: convolved(normed(x), w.repeat(1, 1, 2, 1)[:, :, :5], padding=(2, 1)), 2),
    "no rows of a norm": (with_rows_of_no_norm, 2),
}


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference"])
@pytest.mark.parametrize("deferred", [False, True], ids=["now", "deferred"])
@pytest.mark.parametrize("name", ROUNDS)
def test_rounds(name: str, deferred: bool, inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all ranks alike."""
    if deferred:
        monkeypatch.setattr(recipe, "LEAST_BYTES", 0)
    fn, rounds = ROUNDS[name]
    assert (
        rounds_of(fn, random_tensor((1, 4, 12, 5)), random_tensor((4, 4, 3, 3), 1), inference=inference) == [rounds] * 3
    )


def test_many_ranks_gather_by_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_exchange, "MOST_RANKS", 2)
    fn, rounds = ROUNDS["one after the other"]
    tensors = random_tensor((1, 4, 12, 5)), random_tensor((4, 4, 3, 3), 1)
    assert rounds_of(fn, *tensors, world=2) == [rounds] * 2
    assert rounds_of(fn, *tensors, world=3) == [2 * rounds] * 3


def test_rows_written_by_hand() -> None:
    """Past all rules, on every rank: its version tells."""
    x, w = random_tensor((1, 4, 12, 5)), random_tensor((4, 4, 3, 3), 1)

    def body(rank: int) -> Tensor:
        with torch.no_grad():
            y = normed(distpatch.shard(x, dist.group.WORLD))
            y.local.add_(1)
            return distpatch.gather(convolved(y, w))

    for result in run_ranks(3, body):
        assert torch.allclose(result, convolved(normed(x) + 1, w), rtol=1e-10, atol=1e-10)
