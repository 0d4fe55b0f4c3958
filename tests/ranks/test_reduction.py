"""Reductions: local where the sharded dim stays, merged over ranks where it goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.oracle import H, case

X = (2, 3, H, 5)
MANY = (7, 3, 2)  # at least two rows, so that a sample variance exists


def with_options(name: str) -> dict[str, Callable[[], None]]:
    """One reduction over all dims, the rows, other dims, and some of both."""
    fn = getattr(torch, name)
    return {
        f"{name}": case(fn, X),
        f"{name} of rows": case(lambda x: fn(x, dim=-2), X),
        f"{name} of rows, keepdim": case(lambda x: fn(x, dim=2, keepdim=True) + x, X),
        f"{name} of pixels": case(lambda x: fn(x, dim=(2, 3)), X),
        f"{name} of channels": case(lambda x: fn(x, dim=1), X),
        f"{name} of channels and columns": case(lambda x: fn(x, dim=(1, -1), keepdim=True), X),
    }


CASES = {
    **with_options("sum"),
    **with_options("mean"),
    **with_options("amax"),
    **with_options("amin"),
    "method": case(lambda x: x.mean() + x.sum((-1, -2), keepdim=True), X),
    "sum as fp32": case(lambda x: torch.sum(x.float(), dtype=torch.float64), X, tolerance=1e-6),
    "max": case(lambda x: x.max(), X),
    "min": case(lambda x: x.min(), X),
    "max of channels": case(lambda x: x.max(dim=1), X),
    "any": case(lambda x: (x > 1.5).any(), X),
    "all of rows": case(lambda x: (x < 1.0).all(dim=-2), X),
    "any of columns": case(lambda x: (x > 1.0).any(dim=-1), X),
    "var": case(torch.var, X, heights=MANY),
    "var biased": case(lambda x: x.var(unbiased=False), X),
    "var of pixels": case(lambda x: torch.var(x, dim=(2, 3), keepdim=True), X),
    "var of rows": case(lambda x: torch.var(x, dim=2, correction=0), X),
    "var of channels": case(lambda x: torch.var(x, dim=1), X),
    "std": case(lambda x: x.std(dim=(2, 3)), X),
    "var_mean": case(lambda x: torch.var_mean(x, dim=(2, 3)), X),
    "var_mean of channels": case(lambda x: torch.var_mean(x, dim=1), X),
    "std_mean": case(lambda x: torch.std_mean(x, dim=(0, 2, 3), correction=0), X),
    "used again": case(lambda x: (x - x.mean((2, 3), keepdim=True)) / x.std(), X),
    "instance norm by hand": case(lambda x: (x - x.mean((2, 3), True)) / (x.var((2, 3), keepdim=True) + 0.1).sqrt(), X),
    "squeeze and excite": case(lambda x, w: x * torch.sigmoid(x.mean((2, 3)) @ w)[:, :, None, None], X, (3, 3)),
    "loss": case(lambda x, y: (x - y).square().mean(), X, X),
    "width": case(lambda x: x.sum(-1) * x.mean(), (2, 3, 5, H), dim=-1),
    "norm": case(lambda x: x.norm(), X),
    "argmax": case(lambda x: x.argmax(dim=1), X),
    "median": case(lambda x: x.median(), X, fallback="median"),
    "prod of rows": case(lambda x: x.prod(dim=2), X),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reduction(case: Callable[[], None]) -> None:
    case()


def test_reductions_agree_on_every_rank() -> None:
    """A scalar that steers the model must be the same number everywhere: it is compared bit for bit."""

    def steer(x: Tensor) -> Tensor:
        return x * 2 if bool(x.mean() > 0) else x - 1

    case(steer, X)()
