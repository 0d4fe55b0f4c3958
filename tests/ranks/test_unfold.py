"""Unfold, fold, windows of a dim, pixel and channel shuffles, and grids to sample at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.oracle import H, case, random_tensor

X, W = (2, 4, H, 6), (2, 4, 6, H)
TALL = (9, 3)
EVEN = (10, 4, 2)


def unfold(*size: Any, **options: Any) -> Callable[[Tensor], Any]:
    return lambda x: F.unfold(x, *size, **options)


def there_and_back(*size: Any, **options: Any) -> Callable[[Tensor], Any]:
    return lambda x: F.fold(F.unfold(x, *size, **options).square(), x.shape[-2:], *size, **options)


def fold(height: int, *size: Any, **options: Any) -> Callable[[Tensor], Any]:
    return lambda x: F.fold(x, (height, 6), *size, **options)


def warped(size: tuple[int, ...] = (3, 5), spatial: int = 2) -> Callable[[int], Tensor]:
    return lambda rows: random_tensor((2, *(rows if n == H else n for n in size), spatial), seed=9) * 0.7


def sample(x: Tensor, grid: Tensor, **options: Any) -> Tensor:
    return F.grid_sample(x, grid, align_corners=False, **options)


def by_flow(x: Tensor, flow: Tensor) -> Tensor:
    identity = torch.eye(2, 3, dtype=x.dtype).expand(2, 2, 3)
    grid = F.affine_grid(identity, x.shape, align_corners=True) + flow.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, align_corners=True)


UNFOLD = {
    "3x3": case(unfold(3, padding=1), X, p2p=1),
    "3x3 no padding": case(unfold(3), X, heights=TALL),
    "stride 2": case(unfold(3, padding=1, stride=2), X),
    "2x2 patches": case(unfold(2, stride=2), X, heights=TALL),
    "dilation": case(unfold(3, dilation=2, padding=2), X),
    "per dim": case(unfold((4, 1), padding=(2, 0), stride=(1, 2)), X),
    "columns only": case(unfold((1, 3)), X, p2p=0),
    "unbatched": case(unfold(3, padding=1), (4, H, 6)),
    "width": case(unfold(3, padding=1), W, dim=-1),
    "batch": case(unfold(3), (H, 4, 5, 6), dim=0, p2p=0),
    "channels": case(unfold(2), (2, H, 4, 6), dim=1, p2p=0),
    "module": case(nn.Unfold(3, padding=1), X),
    "unfold, multiply": case(
        lambda x, w: (w @ F.unfold(x, 3, padding=1)).unflatten(2, (-1, 6)), X, (5, 36)
    ),
    "fold 3x3": case(there_and_back(3, padding=1), X),
    "fold 2x2 patches": case(there_and_back(2, stride=2), X, heights=(9, 2)),
    "fold, gaps": case(there_and_back(2, stride=3), X, heights=(9, 4, 2)),
    "fold, dilation": case(there_and_back(3, dilation=2, padding=2, stride=3), X),
    "fold, wide": case(there_and_back((7, 2), padding=(3, 0)), X),
    "fold, unbatched": case(there_and_back(3, padding=1), (4, H, 6)),
    "fold, batch": case(there_and_back(3, padding=1), (H, 4, 3, 6), dim=0),
    "fold, channels": case(there_and_back(2), (2, H, 3, 6), dim=1),
    "fold, from rows of windows": case(fold(8, 2, stride=2), (2, 8, H), dim=-1, heights=(12,)),
    "fold, channels of windows": case(fold(4, 2, stride=2), (2, H, 6), dim=1, heights=(8, 4)),
    "fold, module": case(nn.Fold((4, 6), 3, padding=1), (2, 18, H), dim=-1, heights=(24,)),
    "dim: rows": case(lambda x: x.unfold(2, 3, 1), X, heights=TALL),
    "dim: rows, step 2": case(lambda x: x.unfold(-2, 2, 2), X, heights=TALL),
    "dim: rows, step 4": case(lambda x: x.unfold(2, 2, 4), X, heights=TALL),
    "dim: columns": case(lambda x: x.unfold(3, 3, 2), X, p2p=0),
    "dim: rows and columns": case(lambda x: x.unfold(2, 2, 1).unfold(3, 3, 3), X, heights=TALL),
    "dim: channels": case(lambda x: x.unfold(1, 2, 2), X, p2p=0),
    "dim: width": case(lambda x: x.unfold(3, 2, 1), W, dim=-1, heights=TALL),
}  # fmt: skip

SHUFFLE = {
    "pixels x2": case(lambda x: F.pixel_shuffle(x, 2), X, p2p=0),
    "pixels x3": case(nn.PixelShuffle(3), (2, 9, H, 2)),
    "pixels, unbatched": case(lambda x: F.pixel_shuffle(x, 2), (4, H, 3)),
    "pixels, 5-D": case(lambda x: F.pixel_shuffle(x, 2), (2, 3, 4, H, 3)),
    "pixels, width": case(lambda x: F.pixel_shuffle(x, 2), W, dim=-1),
    "pixels, batch": case(lambda x: F.pixel_shuffle(x, 2), (H, 4, 2, 3), dim=0),
    "pixels, frames": case(lambda x: F.pixel_shuffle(x, 2), (2, H, 4, 2, 3), dim=1),
    "pixels, channels": case(lambda x: F.pixel_shuffle(x, 2), (2, H, 2, 3), dim=1, heights=(12, 4)),
    "back": case(lambda x: F.pixel_unshuffle(x, 2), X, heights=EVEN),
    "back, by 3": case(nn.PixelUnshuffle(3), X, heights=(9, 3)),
    "back, 5-D": case(lambda x: F.pixel_unshuffle(x, 2), (2, 3, 2, H, 4), heights=EVEN),
    "back, width": case(lambda x: F.pixel_unshuffle(x, 2), W, dim=-1, heights=EVEN),
    "back, channels": case(lambda x: F.pixel_unshuffle(x, 2), (2, H, 2, 4), dim=1),
    "there and back": case(lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), X, p2p=0),
    "channels": case(lambda x: F.channel_shuffle(x, 2), X, p2p=0),
    "channels, native": case(
        lambda x: F.native_channel_shuffle(x, 4), lambda rows: torch.arange(rows * 16).view(2, 4, rows, 2), p2p=0
    ),
    "channels, module": case(nn.ChannelShuffle(2), W, dim=-1, p2p=0),
    "channels, sharded": case(
        lambda x: F.channel_shuffle(x, 2), (2, H, 2, 3), dim=1, heights=(8,), fallback="channel_shuffle"
    ),
}  # fmt: skip

SAMPLE = {
    "image and grid": case(sample, X, (2, H, 5, 2), sharded=1, heights=(7, 2)),
    "grid": case(lambda g, x: sample(x, g), (2, H, 5, 2), X, dim=1),
    "grid, columns": case(lambda g, x: sample(x, g, padding_mode="border"), (2, 5, H, 2), X, dim=2),
    "grid, images": case(lambda g, x: sample(x, g), (H, 3, 5, 2), (H, 4, 4, 5), dim=0),
    "grid, coordinates": case(lambda g, x: sample(x, g), (2, 3, 5, H), (2, 4, 4, 5), dim=3, heights=(2,)),
    "another size": case(sample, X, warped()),
    "bicubic, reflected": case(lambda x, g: sample(x, g, mode="bicubic", padding_mode="reflection"), X, warped()),
    "nearest": case(lambda x, g: sample(x, g, mode="nearest"), X, warped()),
    "width": case(sample, W, warped((4, H)), dim=-1),
    "images": case(sample, (H, 3, 4, 5), lambda rows: random_tensor((rows, 3, 2, 2)), dim=0),
    "channels": case(sample, (2, H, 4, 5), warped((3, 2)), dim=1, p2p=0),
    "3d": case(sample, (2, 3, 3, H, 4), warped((2, 3, 4), 3)),
    "warped by a flow": case(by_flow, X, (2, 2, H, 6), sharded=2, heights=(7, 3)),
    "spatial transformer": case(
        lambda x, theta: sample(x, F.affine_grid(theta, x.shape, align_corners=False)), X, (2, 2, 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFOLD.values(), ids=UNFOLD)
def test_unfold(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("case", SHUFFLE.values(), ids=SHUFFLE)
def test_shuffle(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("case", SAMPLE.values(), ids=SAMPLE)
def test_sample(case: Callable[[], None]) -> None:
    case()
