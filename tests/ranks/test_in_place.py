"""In place, with and without a rule, and with ``out=``: the rows, views of them and gradients as on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distpatch
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

X = (2, 3, H, 5)
SOME: dict[str, Any] = {"heights": (7, 3), "worlds": (2, 3)}
ONES = torch.ones(2, 3, 2, 5, dtype=torch.long)


def written(write: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    """What a write makes of a tensor, of a view of it that was taken before, and of what it was made from."""

    def run(x: Tensor) -> Any:
        y = x * 1
        view = y[:, :1]
        assert write(y) is y
        return y, view * y.sum(), x * view.sum()

    return run


def turned(turn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    """A tensor whose dims were moved in place is used, asked and written to; its views keep theirs."""

    def run(x: Tensor) -> Any:
        y = x * 1
        view = y[:, :1]
        assert turn(y) is y and (y.dim(), y.numel()) == (len(y.shape), x.numel())
        y.mul_(2)
        y += 1
        return y * 2, view * 3, y.sum(), y.reshape(-1)

    return run


BY_RULE = {
    "cumsum_": written(lambda y: y.cumsum_(-2)),
    "cumsum_ beside": written(lambda y: y.cumsum_(dim=1)),
    "cumprod_": written(lambda y: y.cumprod_(2)),
    "masked_scatter_": written(lambda y: y.masked_scatter_(y.detach() > 0, y * 2)),
    "index_add_": written(lambda y: y.index_add_(2, torch.tensor([0, 1]), y[:, :, :2] * 2)),
    "addmm_": lambda x: (x[0, 0] * 1).addmm_(x[1, 0], torch.ones(5, 5).double(), beta=2),
    "baddbmm_": lambda x: (x[0] * 1).baddbmm_(x[1], torch.ones(3, 5, 5).double()),
    "a part": lambda x: (y := x * 1, y[:, :, 1:].cumsum_(2), y * 2)[2],
    "int cumsum_": lambda x: (x.detach() * 5).int().cumsum_(2),
    "unsqueeze_": turned(lambda y: y.unsqueeze_(1)),
    "squeeze_": turned(lambda y: y.squeeze_()),
    "transpose_": turned(lambda y: y.transpose_(1, 2)),
    "swapaxes_": turned(lambda y: y.swapaxes_(-1, 0)),
    "t_": lambda x: (y := x[0, 0] * 1, y.t_(), y * 2)[2],
    "unsqueeze_ of copied rows": lambda x: (y := (x * 1)[:, :, 0], y.unsqueeze_(1), y * 2, y.shape[1] * x)[2:],
    "cumsum, out": lambda x: torch.cumsum(x.detach(), 2, out=x.detach() * 1),
    "sum, out": lambda x: torch.sum(x.detach(), 1, out=x.detach()[:, 0] * 1),
    "cat, out": lambda x: torch.cat([x.detach()] * 2, 1, out=torch.cat([x.detach()] * 2, 1)),
    "scatter_": written(lambda y: y.scatter_(2, ONES, 3.0)),
    "scatter_add_": written(lambda y: y.scatter_add_(2, ONES, y[:, :, :2] * 2)),
    "scatter_reduce_": written(lambda y: y.scatter_reduce_(2, ONES, y[:, :, :2] * 2, "amax")),
    "into a plain tensor": lambda x: torch.zeros(2, 3, 9, 5).double().index_add_(2, torch.arange(x.shape[2]), x),
}
GATHERED = {
    "renorm_": ("renorm_", written(lambda y: y.renorm_(2, 2, 1.0))),
    "fill_diagonal_": ("fill_diagonal_", lambda x: (x[0, 0] * 1).fill_diagonal_(0.0)),
    "put_": ("put_", written(lambda y: y.put_(torch.tensor([0, 5, 1]), torch.ones(3).double()))),
    "index_put_": (
        "index_put_",
        written(lambda y: y.index_put_(3 * (torch.tensor([0, 1]),), torch.tensor(1.0).double(), accumulate=True)),
    ),
    "index_reduce_": (
        "index_reduce_",
        written(lambda y: y.index_reduce_(2, torch.tensor([0, 1]), y[:, :, :2] * 2, "prod")),
    ),
    "a part": ("renorm_", lambda x: (y := x * 1, y[:, :, 1:].renorm_(2, 2, 1.0), y * 2)[2]),
    "odd places": (
        "__setitem__",
        lambda x: (y := x * 1, y.__setitem__((torch.tensor([0, 1]), slice(None), torch.tensor([0, 0])), 2.0), y * 2)[2],
    ),
    "renorm, out": ("renorm", lambda x: torch.renorm(x.detach(), 2, 2, 1.0, out=x.detach() * 1)),
    "sum, a plain out": ("sum", lambda x: torch.sum(x.detach(), 1, out=torch.empty(0).double())),
}


@pytest.mark.parametrize("name", BY_RULE)
def test_by_rule(name: str) -> None:
    case(BY_RULE[name], X, **SOME)()


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", GATHERED)
def test_gathered(name: str) -> None:
    op, fn = GATHERED[name]
    case(fn, X, fallback=op, **SOME)()


REFUSED: dict[str, tuple[type[Exception], Callable[[Tensor], object]]] = {
    "another shape": (distpatch.UnsupportedOpError, lambda x: torch.linalg.slogdet(x[..., :2, :2], out=(x[..., 0], x))),
    "no row any more": (distpatch.UnsupportedOpError, lambda x: (x[:, :, :1] * 1).squeeze_()),
    "resize_": (distpatch.UnsupportedOpError, lambda x: x.resize_(2)),
    "a leaf": (RuntimeError, lambda x: (x * 1).detach().requires_grad_().cumsum_(2)),
    "another dtype": (RuntimeError, lambda x: torch.cumsum(x, 2, out=(x * 1).int())),
    "out under gradients": (RuntimeError, lambda x: torch.cumsum(x.clone().requires_grad_(), 2, out=x)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """What cannot be right raises, and the rows are as they were."""
    error, call = REFUSED[name]

    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD)
        before = x.local.clone()
        with pytest.raises(error):
            call(x)
        assert torch.equal(x.local, before)

    run_ranks(2, body)
