"""Padding in every mode, along the sharded dim and across it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests.support.oracle import H, case

X = (2, 3, H, 5)
TALL = (7, 4)  # heights from which three rows can be reflected


def pad(*pads: int, mode: str = "constant", value: float | None = None) -> Callable[[Tensor], Tensor]:
    return lambda x: F.pad(x, pads, mode, value)


CASES = {
    "all sides": case(pad(1, 2, 3, 4), X),
    "rows above": case(pad(0, 0, 2, 0), X, p2p=0),
    "rows below": case(pad(0, 0, 0, 3), X, p2p=0),
    "columns only": case(pad(1, 2), X, p2p=0),
    "channels and batch": case(pad(0, 0, 0, 0, 1, 2, 1, 0), X, p2p=0),
    "value": case(pad(1, 0, 1, 2, value=-2.5), X),
    "negative columns": case(pad(-1, -2, 1, 0), X),
    "negative above": case(pad(0, 0, -3, 1), X, heights=TALL),
    "negative below": case(pad(0, 0, 1, -3), X, heights=TALL),
    "negative on both edges": case(pad(-1, 1, -1, -2), X, heights=TALL),
    "nothing": case(pad(0, 0, 0, 0), X),
    "is a copy": case(lambda x: (F.pad(x, (0, 0, 1, 1)).mul_(2), F.pad(x, (0, 0)).mul_(3), x), X),
    "reflect": case(pad(1, 2, 3, 2, mode="reflect"), X, heights=TALL, p2p=1),
    "reflect columns": case(pad(2, 1, 0, 0, mode="reflect"), X, p2p=0),
    "reflect rows": case(pad(0, 0, 3, 1, mode="reflect"), X, heights=TALL, p2p=1),
    "reflect the least": case(pad(0, 0, 1, 1, mode="reflect"), X, heights=(2,)),
    "replicate": case(pad(1, 2, 3, 4, mode="replicate"), X, p2p=1),
    "replicate columns": case(pad(1, 2, 0, 0, mode="replicate"), X, p2p=0),
    "circular": case(pad(1, 2, 3, 2, mode="circular"), X, heights=(7, 3), p2p=1),
    "circular as tall as the image": case(pad(0, 0, 2, 2, mode="circular"), X, heights=(2,)),
    "circular columns": case(pad(2, 3, 0, 0, mode="circular"), X, p2p=0),
    "unbatched": case(pad(1, 2, 3, 4, mode="replicate"), (3, H, 5)),
    "3d": case(pad(1, 1, 2, 2, 1, 0, mode="replicate"), (1, 2, 3, H, 4)),
    "3d time": case(pad(1, 1, 0, 0, 2, 0), (1, 2, H, 3, 4), dim=2),
    "1d": case(pad(2, 1, mode="circular"), (2, 3, H), dim=-1, heights=(7, 2)),
    "width": case(pad(2, 1, 1, 1, mode="replicate"), (2, 3, 5, H), dim=-1),
    "width reflect": case(pad(2, 1, 0, 1, mode="reflect"), (2, 3, 5, H), dim=-1, heights=TALL),
    "channels_last": case(pad(1, 1, 1, 1), X, channels_last=True),
    "circular convolution": case(lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), w), X, (4, 3, 3, 3), p2p=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pad(case: Callable[[], None]) -> None:
    case()
