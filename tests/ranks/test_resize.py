"""Nearest-neighbour resizing by factor and by size (other modes: test_resize_modes.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests.support.oracle import H, case

X = (2, 3, H, 5)


def by(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, **options)


CASES = {
    "x2": case(by(scale_factor=2.0), X, p2p=0),
    "x2 nearest": case(by(scale_factor=2, mode="nearest"), X, p2p=0),
    "x3": case(by(scale_factor=3.0), X, p2p=0),
    "x1": case(by(scale_factor=1.0), X, p2p=0),
    "x2 rows only": case(by(scale_factor=(2.0, 1.0)), X, p2p=0),
    "x2 columns only": case(by(scale_factor=(1.0, 2.0)), X, p2p=0),
    "half": case(by(scale_factor=0.5), X, heights=(9, 2), p2p=1),
    "x1.5": case(by(scale_factor=1.5), X, p2p=1),
    "x2.3": case(by(scale_factor=2.3), X, p2p=1),
    "x0.7": case(by(scale_factor=0.7), X, heights=(13, 2), p2p=1),
    "x2 recomputed": case(by(scale_factor=2.0, recompute_scale_factor=True), X),
    "x2.3 recomputed": case(by(scale_factor=2.3, recompute_scale_factor=True), X),
    "size doubled": case(lambda x: F.interpolate(x, size=(2 * x.shape[-2], 10)), X, p2p=0),
    "size tripled": case(lambda x: F.interpolate(x, size=(3 * x.shape[-2], 3)), X, p2p=0),
    "size 11": case(by(size=(11, 4)), X, p2p=1),
    "size 3": case(by(size=3), X, p2p=1),
    "size 1": case(by(size=(1, 5)), X, p2p=1),
    "one size": case(by(size=6), (2, 3, H, 6), p2p=1),
    "1d": case(by(scale_factor=2.0), (2, 3, H), dim=-1),
    "3d": case(by(scale_factor=(1.0, 2.0, 2.0)), (1, 2, 3, H, 4)),
    "3d time": case(by(scale_factor=(2.0, 1.0, 1.0)), (1, 2, H, 3, 4), dim=2),
    "width": case(by(scale_factor=2.0), (2, 3, 5, H), dim=-1, p2p=0),
    "width 1.5": case(by(scale_factor=1.5), (2, 3, 5, H), dim=-1, p2p=1),
    "channels_last": case(by(scale_factor=2.0), X, channels_last=True),
    "up, convolve": case(lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2.0), w, padding=1), X, (4, 3, 3, 3), p2p=1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_resize(case: Callable[[], None]) -> None:
    case()
