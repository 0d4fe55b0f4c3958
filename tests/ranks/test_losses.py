"""Losses of sharded predictions, against sharded and replicated targets, reduced in every way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.oracle import H, case

X = (2, 4, H, 5)


def every(loss: Callable[..., Tensor], **options: Any) -> Any:
    """All reductions of one loss."""

    def run(x: Tensor, *others: Tensor) -> list[Tensor]:
        return [loss(x, *others, **options, reduction=reduction) for reduction in ("none", "sum", "mean")]

    return run


def classes(*shape: int, ignored: bool = False) -> Callable[[int], Tensor]:
    """Numbers of classes, below 4; H stands for the rows. Some may be -100, which is ignored."""

    def make(rows: int) -> Tensor:
        sizes = tuple(rows if n == H else n for n in shape)
        drawn = torch.randint(4 + ignored, sizes, generator=torch.Generator().manual_seed(5))
        return drawn.where(drawn < 4, -100)

    return make


CASES = {
    "mse": case(every(F.mse_loss), X, X, sharded=2),
    "mse of plain": case(every(F.mse_loss), X, X),
    "mse with plain": case(lambda x, y: F.mse_loss(y, x), X, X),
    "mse, weighted": case(lambda x, y: F.mse_loss(x, y, weight=x.detach()), X, X, sharded=2, fallback="mse_loss"),
    "l1": case(every(F.l1_loss), X, X, sharded=2),
    "l1 of old": case(lambda x, y: F.mse_loss(x, y, None, None, "sum"), X, X, sharded=2),
    "smooth l1": case(every(F.smooth_l1_loss, beta=0.5), X, X),
    "huber": case(every(F.huber_loss, delta=0.5), X, X, sharded=2),
    "soft margin": case(lambda x, y: every(F.soft_margin_loss)(x, y.detach().sign()), X, X),
    "poisson": case(every(F.poisson_nll_loss, full=False), X, X),
    "binary": case(lambda x, y, w: every(F.binary_cross_entropy)(x.sigmoid(), y.sigmoid(), w.detach()), X, X, (H, 5)),
    "binary, logits": case(
        lambda x, y, w: every(F.binary_cross_entropy_with_logits, pos_weight=w.detach().exp())(x, y.sigmoid()), X, X, (4, 1, 1)
    ),
    "divergence": case(lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="sum"), X, X, sharded=2),
    "divergence of a batch": case(
        lambda x, y: F.kl_div(x, y, reduction="batchmean", log_target=True), X, X, sharded=2
    ),
    "cross entropy": case(every(F.cross_entropy), X, classes(2, H, 5)),
    "cross entropy, sharded classes": case(every(F.cross_entropy), X, classes(2, H, 5), sharded=1),
    "cross entropy, ignored": case(every(F.cross_entropy), X, classes(2, H, 5, ignored=True)),
    "cross entropy, a class that cannot be": case(
        lambda x, y: F.cross_entropy(torch.where(x > 1, -math.inf, x), y), X, classes(2, H, 5, ignored=True)
    ),
    "cross entropy, weighted": case(
        lambda x, y, w: every(F.cross_entropy, weight=w.detach().exp(), ignore_index=2)(x, y), X, classes(2, H, 5), (4,)
    ),
    "cross entropy, smoothed": case(every(F.cross_entropy, label_smoothing=0.1), X, classes(2, H, 5, ignored=True)),
    "cross entropy, smoothed and weighted": case(
        lambda x, y, w: F.cross_entropy(x, y, w.detach().exp(), label_smoothing=0.1), X, classes(2, H, 5), (4,),
        fallback="cross_entropy",
    ),
    "cross entropy of probabilities": case(lambda x, y: every(F.cross_entropy)(x, y.softmax(1)), X, X, sharded=2),
    "cross entropy of probabilities, weighted": case(
        lambda x, y, w: every(F.cross_entropy, weight=w.detach(), label_smoothing=0.2)(x, y.softmax(1)), X, X, (4,), fallback="cross_entropy"
    ),
    "cross entropy of tokens": case(every(F.cross_entropy), (H, 4), classes(H), dim=0),
    "cross entropy of columns": case(every(F.cross_entropy), (2, 4, 3, H), classes(2, 3, H), dim=-1),
    "cross entropy, classes sharded": case(
        every(F.cross_entropy), (2, H, 3), lambda rows: torch.arange(6).view(2, 3) % rows, dim=1
    ),
    "nll": case(lambda x, y, w: every(F.nll_loss, weight=w.detach())(x.log_softmax(1), y), X, classes(2, H, 5), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses(case: Callable[[], None]) -> None:
    case()
