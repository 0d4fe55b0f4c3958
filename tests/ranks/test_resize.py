"""Every mode of ``interpolate``, larger and smaller, by size and by factor; the modules and grids around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from tests.support.oracle import H, case, random_tensor, since_2_13
from tests.support.threads import rank_outcomes, run_ranks

X, W = (2, 3, H, 5), (2, 3, 5, H)
TALL = (13, 2)


def nearest(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, **options)


NEAREST = {
    "x2": case(nearest(scale_factor=2.0), X, p2p=0),
    "x2 nearest": case(nearest(scale_factor=2, mode="nearest"), X, p2p=0),
    "x3": case(nearest(scale_factor=3.0), X, p2p=0),
    "x1": case(nearest(scale_factor=1.0), X, p2p=0),
    "x2 rows only": case(nearest(scale_factor=(2.0, 1.0)), X, p2p=0),
    "x2 columns only": case(nearest(scale_factor=(1.0, 2.0)), X, p2p=0),
    "half": case(nearest(scale_factor=0.5), X, heights=(9, 2), p2p=1),
    "x1.5": case(nearest(scale_factor=1.5), X, p2p=1),
    "x2.3": case(nearest(scale_factor=2.3), X, p2p=1),
    "x0.7": case(nearest(scale_factor=0.7), X, heights=(13, 2), p2p=1),
    "x2 recomputed": case(nearest(scale_factor=2.0, recompute_scale_factor=True), X),
    "x2.3 recomputed": case(nearest(scale_factor=2.3, recompute_scale_factor=True), X),
    "size doubled": case(lambda x: F.interpolate(x, size=(2 * x.shape[-2], 10)), X, p2p=0),
    "size tripled": case(lambda x: F.interpolate(x, size=(3 * x.shape[-2], 3)), X, p2p=0),
    "size 11": case(nearest(size=(11, 4)), X, p2p=1),
    "size 3": case(nearest(size=3), X, p2p=1),
    "size 1": case(nearest(size=(1, 5)), X, p2p=1),
    "one size": case(nearest(size=6), (2, 3, H, 6), p2p=1),
    "1d": case(nearest(scale_factor=2.0), (2, 3, H), dim=-1),
    "3d": case(nearest(scale_factor=(1.0, 2.0, 2.0)), (1, 2, 3, H, 4)),
    "3d time": case(nearest(scale_factor=(2.0, 1.0, 1.0)), (1, 2, H, 3, 4), dim=2),
    "width": case(nearest(scale_factor=2.0), (2, 3, 5, H), dim=-1, p2p=0),
    "width 1.5": case(nearest(scale_factor=1.5), (2, 3, 5, H), dim=-1, p2p=1),
    "channels_last": case(nearest(scale_factor=2.0), X, channels_last=True),
    "up, convolve": case(lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2.0), w, padding=1), X, (4, 3, 3, 3), p2p=1),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAREST.values(), ids=NEAREST)
def test_nearest(case: Callable[[], None]) -> None:
    case()


def by(mode: str, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, mode=mode, **options)


MODES = {
    "nearest-exact x2": case(by("nearest-exact", scale_factor=2.0), X, p2p=0),
    "nearest-exact x3": case(by("nearest-exact", scale_factor=3), X, p2p=0),
    "nearest-exact x2.3": case(by("nearest-exact", scale_factor=2.3), X, p2p=1),
    "nearest-exact x0.6": case(by("nearest-exact", scale_factor=0.6), X, heights=TALL, p2p=1),
    "nearest-exact size 11": case(by("nearest-exact", size=(11, 4)), X, p2p=1),
    "nearest-exact size 3": case(by("nearest-exact", size=3), X),
    "nearest-exact 1d": case(by("nearest-exact", scale_factor=1.5), (2, 3, H), dim=-1, heights=TALL),
    "nearest-exact 3d": case(by("nearest-exact", size=(2, 9, 3)), (1, 2, 3, H, 4)),
    "nearest x41": case(by("nearest", scale_factor=(41.0, 1.0)), X, heights=(3, 1)),
    "bilinear x2": case(by("bilinear", scale_factor=2.0), X, p2p=1),
    "bilinear x4": case(by("bilinear", scale_factor=(4.0, 2.0)), X, p2p=1),
    "bilinear x3": case(by("bilinear", scale_factor=3.0), X, p2p=1),
    "bilinear x1.7": case(by("bilinear", scale_factor=1.7), X, p2p=1),
    "bilinear x1.7 recomputed": case(by("bilinear", scale_factor=1.7, recompute_scale_factor=True), X),
    "bilinear half": case(by("bilinear", scale_factor=0.5), X, heights=TALL),
    "bilinear x0.3": case(by("bilinear", scale_factor=0.3), X, heights=(13, 4)),
    "bilinear, as many rows": case(by("bilinear", scale_factor=(1.1, 2.0)), X, heights=(7,), fallback="interpolate"),
    "bicubic, as many columns": case(by("bicubic", scale_factor=(2.0, 1.1)), X, heights=(7,), fallback="interpolate"),
    "bilinear, columns": case(by("bilinear", scale_factor=(1.0, 1.6)), X, p2p=0),
    "bilinear, rows": case(by("bilinear", scale_factor=(1.6, 1.0)), X),
    "bilinear size": case(by("bilinear", size=(11, 4)), X, p2p=1),
    "bilinear size doubled": case(lambda x: F.interpolate(x, (2 * x.shape[2], 10), mode="bilinear"), X, p2p=1),
    "bilinear one row": case(by("bilinear", size=(1, 7)), X),
    "bilinear corners": case(by("bilinear", scale_factor=2, align_corners=True), X, p2p=1),
    "bilinear corners, size": case(by("bilinear", size=(10, 3), align_corners=True), X, p2p=1),
    "bilinear corners, smaller": case(by("bilinear", size=(3, 9), align_corners=True), X),
    "bilinear corners, one row": case(by("bilinear", size=(1, 1), align_corners=True), X),
    "bilinear smooth": case(by("bilinear", size=(4, 3), antialias=True), X, p2p=1),
    "bilinear smooth x0.4": case(by("bilinear", scale_factor=0.4, antialias=True), X, heights=(13, 3)),
    "bilinear smooth x1.5": case(by("bilinear", scale_factor=1.5, antialias=True), X, heights=TALL),
    "bilinear smooth corners": case(by("bilinear", size=(4, 8), antialias=True, align_corners=True), X),
    "bicubic x2": case(by("bicubic", scale_factor=2.0), X, p2p=1),
    "bicubic x1.7": case(by("bicubic", scale_factor=1.7), X),
    "bicubic half": case(by("bicubic", scale_factor=0.5), X, heights=TALL),
    "bicubic size": case(by("bicubic", size=(11, 4)), X),
    "bicubic corners": case(by("bicubic", size=(10, 9), align_corners=True), X),
    "bicubic smooth": case(by("bicubic", size=(3, 3), antialias=True), X),
    "bicubic smooth x1.5": case(by("bicubic", scale_factor=1.5, antialias=True), X, heights=TALL),
    "lanczos smooth": since_2_13(case(by("lanczos", size=(4, 3), antialias=True), X)),
    "lanczos smooth x2": since_2_13(case(by("lanczos", scale_factor=2.0, antialias=True), X)),
    "area": case(by("area", size=(3, 3)), X),
    "area half": case(by("area", scale_factor=0.5), X, heights=(14, 2)),
    "area x0.7": case(by("area", scale_factor=0.7), X, heights=TALL),
    "area larger": case(by("area", size=(9, 7)), X),
    "area 1d": case(by("area", size=5), (2, 3, H), dim=-1),
    "area 3d": case(by("area", size=(2, 4, 3)), (1, 2, 3, H, 4)),
    "linear": case(by("linear", scale_factor=2), (2, 3, H), dim=-1, p2p=1),
    "linear x1.3": case(by("linear", scale_factor=1.3), (2, 3, H), dim=-1, heights=(7, 1)),
    "linear corners": case(by("linear", size=9, align_corners=True), (2, 3, H), dim=-1),
    "trilinear, height": case(by("trilinear", scale_factor=2.0), (1, 2, 3, H, 4), p2p=1),
    "trilinear, time": case(by("trilinear", scale_factor=(1.5, 2.0, 1.0)), (1, 2, H, 3, 4), dim=2),
    "trilinear, width": case(by("trilinear", size=(2, 4, 9), align_corners=True), (1, 2, 3, 4, H), dim=-1),
    "width, bilinear x2": case(by("bilinear", scale_factor=2.0), W, dim=-1, p2p=1),
    "width, bilinear size": case(by("bilinear", size=(7, 10)), W, dim=-1),
    "width, bicubic corners": case(by("bicubic", size=(3, 11), align_corners=True), W, dim=-1),
    "width, nearest-exact": case(by("nearest-exact", scale_factor=1.5), W, dim=-1),
    "batch": case(by("bilinear", scale_factor=1.5), (H, 3, 4, 5), dim=0, p2p=0),
    "channels": case(by("bicubic", size=(3, 9)), (2, H, 4, 5), dim=1, p2p=0),
    "bytes": case(
        by("bilinear", size=(5, 4)), lambda rows: torch.arange(rows * 15, dtype=torch.uint8).view(1, 3, rows, 5),
        heights=(7,), fallback="interpolate",
    ),
    "bytes, nearest": case(
        by("nearest-exact", size=(5, 4)), lambda rows: torch.arange(rows * 15, dtype=torch.uint8).view(1, 3, rows, 5)
    ),
    "channels_last": case(by("bilinear", scale_factor=1.5), X, channels_last=True, heights=TALL),
    "Upsample": case(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), X),
    "UpsamplingNearest2d": case(nn.UpsamplingNearest2d(size=(9, 5)), X),
    "UpsamplingBilinear2d": case(nn.UpsamplingBilinear2d(scale_factor=2), X),
    "upsample": case(lambda x: F.upsample(x, scale_factor=2, mode="bicubic"), X),
    "upsample_nearest": case(lambda x: F.upsample_nearest(x, scale_factor=2), X),
    "upsample_bilinear": case(lambda x: F.upsample_bilinear(x, size=(9, 9)), X),
    "down, up, convolve": case(
        lambda x, w: F.conv2d(by("bilinear", size=x.shape[-2:])(by("area", size=(3, 3))(x)), w), X, (4, 3, 1, 1)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*nn.functional.upsample.* is deprecated")
@pytest.mark.parametrize("case", MODES.values(), ids=MODES)
def test_modes(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize(
    "options", [{}, {"size": 3, "mode": "trilinear"}, {"size": 0}, {"size": 3, "scale_factor": 2.0}], ids=str
)
def test_what_torch_refuses(options: dict[str, Any]) -> None:
    """Every rank gets torch's own error."""
    x = random_tensor((1, 2, 7, 4))
    with pytest.raises(Exception) as expected:
        F.interpolate(x, **options)

    def body(rank: int) -> None:
        F.interpolate(distpatch.shard(x, dist.group.WORLD), **options)

    with pytest.warns(UserWarning, match="no sharded rule for interpolate"):
        outcomes = rank_outcomes(2, body)
    assert [(type(error), str(error)) for error in outcomes] == [(expected.type, str(expected.value))] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 3.0, "mode": "bilinear"},
        {"scale_factor": 1.7, "mode": "bilinear"},
        {"size": (4999, 3), "mode": "bilinear", "align_corners": True},
        {"size": (4999, 5), "mode": "bicubic"},
        {"size": (1777, 2), "mode": "bicubic", "antialias": True},
        {"scale_factor": (41.0, 1.0), "mode": "nearest"},
        {"scale_factor": (0.37, 1.0), "mode": "nearest-exact"},
    ],
    ids=str,
)
def test_thousands_of_rows_in_fp32(options: dict[str, Any]) -> None:
    """Torch places a row in fp32, 1e-4 rows off here; a sharded run is off by as much, not by its own."""
    x = random_tensor((1, 1, 3001, 2), dtype=torch.float32)
    right = F.interpolate(x, **options)

    def body(rank: int) -> torch.Tensor:
        resized = F.interpolate(distpatch.shard(x, dist.group.WORLD), **options)
        return distpatch.gather(resized)

    for got in run_ranks(3, body):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["bilinear", "area", "mean", "window"])
def test_half_precision_adds_up_in_fp32(op: str, dtype: torch.dtype) -> None:
    """No further from the fp64 result than torch is."""
    functions = {
        "bilinear": lambda x: F.interpolate(x, (401, 3), mode="bilinear"),
        "area": lambda x: F.interpolate(x, (150, 3), mode="area"),
        "mean": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
        "window": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    }
    x = (random_tensor((1, 2, 257, 4)) + 30).to(dtype)
    exact, theirs = functions[op](x.double()), functions[op](x)

    def body(rank: int) -> torch.Tensor:
        return distpatch.gather(functions[op](distpatch.shard(x, dist.group.WORLD)))

    for got in run_ranks(3, body):
        assert got.dtype == dtype
        assert (got.double() - exact).abs().max() <= 1.01 * (theirs.double() - exact).abs().max()
