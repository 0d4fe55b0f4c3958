"""Pooling by windows and to any size, with and without indices, and max-unpooling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.oracle import H, case

X, W = (2, 3, H, 6), (2, 3, 6, H)
TALL = (13, 5)


def ties(rows: int) -> Tensor:
    """Few different values, so that most windows have several maxima; and some of nothing but -inf."""
    image = torch.randint(0, 3, (2, 3, rows, 6), generator=torch.Generator().manual_seed(rows)).double()
    image[1, :, : max(rows // 2, 1)] = -torch.inf
    return image


def upside_down(rows: int) -> Tensor:
    """Indices for 3 columns that send the first row to the bottom: far from the rows of a window."""
    return 4 * torch.arange(3 * rows).view(1, 1, rows, 3).expand(2, 3, rows, 3).flip(2)


def pyramid(x: Tensor) -> Tensor:
    """The context of a segmentation net: means of coarse parts, as large as the image."""
    levels = [F.adaptive_avg_pool2d(x, size) for size in (1, 2, 3, 6)]
    return torch.cat([x, *(F.interpolate(level, x.shape[2:], mode="bilinear") for level in levels)], 1)


def maxima(*size: Any, **options: Any) -> Callable[[Tensor], Any]:
    return lambda x: F.max_pool2d(x, *size, **options)


def means(*size: Any, **options: Any) -> Callable[[Tensor], Any]:
    return lambda x: F.avg_pool2d(x, *size, **options)


def again(x: Tensor, kernel: int, output_size: Any = None, **options: Any) -> Tensor:
    """Pooled, changed, and put back where the maxima were."""
    values, indices = F.max_pool2d(x, kernel, return_indices=True, **options)
    return F.max_unpool2d(values.square(), indices, kernel, output_size=output_size, **options)


MAX = {
    "2x2": case(maxima(2), X, heights=TALL),
    "3x3 stride 2": case(maxima(3, 2, 1), X, p2p=1),
    "3x3 stride 1": case(maxima(3, 1, 1), X, p2p=1),
    "5x5 stride 1": case(maxima(5, 1, 2), X),
    "13x13 stride 1": case(maxima(13, 1, 6), X),
    "ceil_mode": case(maxima(2, ceil_mode=True), X),
    "ceil_mode 3x3 stride 2": case(maxima(3, 2, 1, ceil_mode=True), X),
    "ceil_mode, window past the padding": case(maxima(3, 3, 1, ceil_mode=True), X, heights=(7, 5, 1)),
    "dilation": case(maxima(5, 1, 2, 2), X, heights=TALL),
    "dilation, stride, ceil_mode": case(maxima(2, 3, 1, 3, True), X, heights=TALL),
    "stride wider than the kernel": case(maxima(1, 3), X),
    "per dim": case(maxima((3, 1), (2, 1), (1, 0)), X),
    "columns": case(maxima((1, 2)), X, p2p=0),
    "channels_last": case(maxima(3, 2, 1), X, channels_last=True),
    "unbatched": case(maxima(3, 2, 1), (3, H, 6)),
    "width": case(maxima(3, 2, 1), W, dim=-1),
    "batch": case(maxima(2), (H, 3, 4, 5), dim=0, p2p=0),
    "channels": case(maxima(2, return_indices=True), (2, H, 4, 5), dim=1, p2p=0),
    "integers": case(maxima(3, 2, 1), lambda rows: torch.arange(rows * 12).view(1, 2, rows, 6) - 99),
    "ties": case(maxima(2, 1), ties, heights=(7, 3)),
    "1d": case(lambda x: F.max_pool1d(x, 3, 2, 1), (2, 3, H), dim=-1),
    "1d, torch's": case(lambda x: torch.max_pool1d(x, 2, ceil_mode=True), (2, 3, H), dim=-1),
    "3d": case(lambda x: F.max_pool3d(x, 3, 2, 1), (1, 2, 3, H, 4)),
    "3d, time": case(lambda x: F.max_pool3d(x, (2, 1, 2)), (1, 2, H, 3, 4), dim=2, heights=(7, 2)),
    "indices 2x2": case(maxima(2, return_indices=True), X, heights=TALL),
    "indices 3x3 stride 2": case(maxima(3, 2, 1, return_indices=True), X),
    "indices, dilation": case(maxima(5, 1, 2, 2, return_indices=True), X, heights=TALL),
    "indices, ceil_mode": case(maxima(3, 2, 1, ceil_mode=True, return_indices=True), X),
    "indices, ties": case(maxima(3, 1, 1, return_indices=True), ties),
    "indices, dilated ties": case(maxima(4, 1, 2, 2, return_indices=True), ties, heights=TALL),
    "indices, width": case(maxima(3, 2, 1, return_indices=True), W, dim=-1),
    "indices, unbatched": case(maxima(2, return_indices=True), (3, H, 6), heights=(7, 2)),
    "indices 1d": case(lambda x: F.max_pool1d(x, 2, return_indices=True), (2, 3, H), dim=-1, heights=TALL),
    "indices 3d, height": case(lambda x: F.max_pool3d(x, 3, 2, 1, return_indices=True), (1, 2, 3, H, 4)),
    "indices 3d, width": case(
        lambda x: F.max_pool3d(x, 2, 1, return_indices=True), (1, 2, 3, 2, H), dim=-1, heights=TALL
    ),
    "indices, by name": case(lambda x: F.max_pool2d_with_indices(x, 3, 2, 1), X),
    "module": case(nn.MaxPool2d(3, 2, 1), X),
    "module, indices": case(nn.MaxPool2d(2, return_indices=True), X, heights=(7, 2)),
    "unpool": case(lambda x: again(x, 2), X, heights=(8, 2)),
    "unpool, output size": case(lambda x: again(x, 2, x.shape[-2:]), X, heights=TALL),
    "unpool, overlapping": case(lambda x: again(x, 3, x.shape[-2:], stride=2, padding=1), X, heights=(7, 3)),
    "unpool, width": case(lambda x: again(x, 2, x.shape), W, dim=-1, heights=TALL),
    "unpool, batch": case(lambda x: again(x, 2), (H, 3, 4, 4), dim=0, p2p=0),
    "unpool, plain indices": case(lambda x: F.max_unpool2d(x, upside_down(x.shape[2]), 2), (2, 3, H, 3)),
    "unpool 1d": case(
        lambda x: F.max_unpool1d(*F.max_pool1d(x, 3, return_indices=True), 3), (2, 3, H), dim=-1, heights=(9, 3)
    ),
    "unpool 3d": case(
        lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), (1, 2, 2, H, 4), heights=(8, 2)
    ),
}  # fmt: skip

MEAN = {
    "2x2": case(means(2), X, heights=TALL),
    "3x3 stride 1": case(means(3, 1, 1), X, p2p=1),
    "3x3 stride 2": case(means(3, 2, 1), X, p2p=1),
    "padding not counted": case(means(3, 1, 1, count_include_pad=False), X),
    "5x5, padding not counted": case(means(5, 2, 2, count_include_pad=False), X),
    "ceil_mode": case(means(2, ceil_mode=True), X),
    "ceil_mode, padding": case(means(3, 2, 1, ceil_mode=True), X),
    "ceil_mode, wide stride": case(means(4, 3, 1, ceil_mode=True), X, heights=(8, 7, 2)),
    "ceil_mode, padding not counted": case(means(3, 2, 1, True, False), X),
    "divisor": case(means(3, 2, 1, divisor_override=5), X),
    "divisor, ceil_mode": case(means(2, 2, 0, True, divisor_override=1), X),
    "columns": case(means((1, 2), (1, 1)), X, p2p=0),
    "per dim": case(means((4, 1), (1, 2), (2, 0), count_include_pad=False), X),
    "channels_last": case(means(2), X, heights=TALL, channels_last=True),
    "unbatched": case(means(3, 1, 1, count_include_pad=False), (3, H, 6)),
    "width": case(means(3, 2, 1, count_include_pad=False), W, dim=-1),
    "batch": case(means(2), (H, 3, 4, 5), dim=0, p2p=0),
    "channels": case(means(2), (2, H, 4, 5), dim=1, p2p=0),
    "1d": case(lambda x: F.avg_pool1d(x, 3, 2, 1, True, False), (2, 3, H), dim=-1),
    "3d": case(lambda x: F.avg_pool3d(x, 3, 2, 1, True, False), (1, 2, 3, H, 4), heights=(7, 3)),
    "3d, time": case(lambda x: F.avg_pool3d(x, (2, 1, 1), stride=1), (1, 2, H, 3, 4), dim=2, heights=(7, 2)),
    "module": case(nn.AvgPool2d(3, 2, 1), X),
    "power": case(lambda x: F.lp_pool2d(x.abs(), 2.0, 2), X, heights=TALL),
    "power, ceil_mode": case(lambda x: F.lp_pool2d(x.abs() + 0.1, 3, (3, 2), 2, ceil_mode=True), X, heights=(7, 4, 3)),
    "power inf": case(lambda x: F.lp_pool2d(x, float("inf"), 2), X, heights=TALL),
    "power -inf": case(lambda x: F.lp_pool2d(x, -float("inf"), 2), X, heights=TALL),
    "power 1d": case(lambda x: F.lp_pool1d(x.abs() + 0.1, 1.5, 2), (2, 3, H), dim=-1, heights=TALL),
    "power 3d": case(nn.LPPool3d(2, 2, 1), (1, 2, 2, H, 4), heights=(7, 2)),
    "power, module": case(nn.LPPool2d(4, 3, stride=1), X, heights=TALL),
}  # fmt: skip


def adaptive_mean(*size: Any) -> Callable[[Tensor], Any]:
    return lambda x: F.adaptive_avg_pool2d(x, size if len(size) > 1 else size[0])


def adaptive_max(*size: Any) -> Callable[[Tensor], Any]:
    return lambda x: F.adaptive_max_pool2d(x, size if len(size) > 1 else size[0], return_indices=True)


ADAPTIVE = {
    "mean to 1": case(adaptive_mean(1), X, p2p=0),
    "mean to one row": case(adaptive_mean(1, 4), X, p2p=0),
    "mean to 2": case(adaptive_mean(2), X, heights=(13, 7, 1), p2p=0),
    "mean to 3": case(adaptive_mean(3, 2), X, heights=(13, 7, 2)),
    "mean to 5": case(adaptive_mean(5), X, heights=(7, 13)),
    "mean to 9": case(adaptive_mean(9), X),
    "mean to 9, of infinite": case(lambda x: adaptive_mean(9)(torch.where(x > 1, math.inf, x)), X),
    "mean of whole numbers": case(
        lambda x: F.avg_pool2d((x.detach() * 9).long(), 3, 1, 1, count_include_pad=False), X, fallback="avg_pool2d"
    ),
    "mean, halved": case(lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 2, 3)), X, heights=(14, 6), p2p=1),
    "mean, rows kept": case(adaptive_mean(None, 3), X, p2p=0),
    "mean, unbatched": case(adaptive_mean(3), (3, H, 6)),
    "mean, width": case(adaptive_mean(2, 5), W, dim=-1),
    "mean, batch": case(adaptive_mean(2), (H, 3, 4, 5), dim=0, p2p=0),
    "mean, channels": case(adaptive_mean(2), (2, H, 4, 5), dim=1, p2p=0),
    "mean 1d": case(lambda x: F.adaptive_avg_pool1d(x, 3), (2, 3, H), dim=-1),
    "mean 1d to 1": case(lambda x: F.adaptive_avg_pool1d(x, 1), (2, 3, H), dim=-1),
    "mean 3d": case(lambda x: F.adaptive_avg_pool3d(x, (2, 4, None)), (1, 2, 3, H, 4)),
    "mean, module": case(nn.AdaptiveAvgPool2d((4, 2)), X),
    "max to 1": case(adaptive_max(1), X, p2p=0),
    "max to 2": case(adaptive_max(2), X, heights=(13, 7, 1), p2p=0),
    "max to 3": case(adaptive_max(3, 2), X, heights=(13, 7, 2)),
    "max to 5": case(adaptive_max(5), X, heights=(7, 13)),
    "max to 9": case(adaptive_max(9), X),
    "max, halved": case(lambda x: F.adaptive_max_pool2d(x, (x.shape[2] // 2, 3)), X, heights=(14, 6), p2p=1),
    "max, ties": case(adaptive_max(2), ties, heights=(13, 7)),
    "max to 1, ties": case(adaptive_max(1), ties, p2p=0),
    "max to 6, ties": case(adaptive_max(6, 3), ties, heights=(13, 12)),
    "max of columns, ties": case(adaptive_max(2), ties, heights=(13, 7), dim=-1),
    "max of columns to 1, ties": case(adaptive_max(1), ties, p2p=0, dim=-1),
    "max, width": case(adaptive_max(2, 5), W, dim=-1),
    "max, channels": case(adaptive_max(2), (2, H, 4, 5), dim=1, p2p=0),
    "max 1d": case(lambda x: torch.adaptive_max_pool1d(x, 2), (2, 3, H), dim=-1),
    "max 3d": case(lambda x: F.adaptive_max_pool3d(x, (2, 4, 3), return_indices=True), (1, 2, 3, H, 4)),
    "max, module": case(nn.AdaptiveMaxPool2d(1), X),
    "squeeze and excite": case(lambda x, w: x * F.conv2d(F.adaptive_avg_pool2d(x, 1), w).sigmoid(), X, (3, 3, 1, 1)),
    "classify": case(lambda x, w: F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), w), X, (4, 3)),
    "pyramid": case(pyramid, X, heights=(13, 7)),
}  # fmt: skip


@pytest.mark.parametrize("case", MAX.values(), ids=MAX)
def test_max(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("case", MEAN.values(), ids=MEAN)
def test_mean(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("case", ADAPTIVE.values(), ids=ADAPTIVE)
def test_adaptive(case: Callable[[], None]) -> None:
    case()
