"""Operations of random chains: stencils, pads and resizing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.support.chains.vocabulary import Draw, op

# --- stencils


@op("stencil")
def conv(d: Draw, x: Tensor) -> str:
    n, channels = d.spatial(x), x.shape[1]
    groups = d.divisor(channels) if d.maybe() else 1
    weight = d.plain(groups * d.int(1, 2), channels // groups, *d.each(n, 1, 3))
    bias = d.plain(d.inputs[-1].shape[0]) if d.maybe() else None
    padding: Any = d.of(repr("same"), repr("valid"), d.int(0, 2), d.each(n, 0, 3), d.each(n, 0, 3))
    stride, dilation = d.of(1, d.each(n, 1, 3)), d.of(1, d.each(n, 1, 2))
    if x.shape[0] == 1 and d.maybe():
        return f"x = F.conv{n}d(x[0], {weight}, {bias}, {stride}, {padding}, {dilation}, {groups})[None]"
    return f"x = F.conv{n}d(x, {weight}, {bias}, {stride}, {padding}, {dilation}, {groups})"


@op("stencil")
def conv_transpose(d: Draw, x: Tensor) -> str:
    n, channels = d.spatial(x), x.shape[1]
    groups = d.divisor(channels) if d.maybe() else 1
    weight = d.plain(channels, d.int(1, 2), *d.each(n, 1, 4))
    stride, padding, dilation = d.each(n, 1, 3), d.each(n, 0, 2), d.each(n, 1, 2)
    extra = d.of(0, d.each(n, 0, 2))
    return f"x = F.conv_transpose{n}d(x, {weight}, None, {stride}, {padding}, {extra}, {groups}, {dilation})"


@op("stencil")
def max_pool(d: Draw, x: Tensor) -> str:
    n, k = d.spatial(x), d.int(1, 4)
    padding, stride = d.int(0, k // 2), d.of(None, d.int(1, 3))
    dilation = d.of(1, 1, 2) if min(x.shape[2:]) > 1 else 1  # torch writes beyond an image that no tap meets
    return f"x = F.max_pool{n}d(x, {k}, {stride}, {padding}, {dilation}, {d.maybe()})"


@op("stencil")
def avg_pool(d: Draw, x: Tensor) -> str:
    n, k = d.spatial(x), d.int(1, 4)
    padding, stride = d.int(0, k // 2), d.of(None, d.int(1, 3))
    divisor = f", {d.of(None, 3)}" if n > 1 else ""
    return f"x = F.avg_pool{n}d(x, {k}, {stride}, {padding}, {d.maybe()}, {d.maybe()}{divisor})"


@op("stencil")
def lp_pool(d: Draw, x: Tensor) -> str:
    return f"x = F.lp_pool{d.spatial(x)}d(x, {d.of(2.0, 3.0)}, {d.int(1, 3)}, {d.of(None, 2)}, {d.maybe()})"


@op("stencil")
def adaptive_pool(d: Draw, x: Tensor) -> str:
    n = d.spatial(x)
    return f"x = F.adaptive_{d.of('avg', 'max')}_pool{n}d(x, {d.each(n, 1, 8)})"


@op("stencil")
def unpool(d: Draw, x: Tensor) -> str:
    n, k = d.spatial(x), d.int(1, 3)
    pooled = f"x, i = F.max_pool{n}d(x, {k}, return_indices=True); "
    return pooled + d.of(f"x = F.max_unpool{n}d(x, i, {k})", "x = x + i * 0.01")


@op("stencil", "pad")
def pad(d: Draw, x: Tensor) -> str:
    mode = d.of("constant", "reflect", "replicate", "circular")
    n = d.int(1, x.ndim) if mode == "constant" else d.spatial(x)
    low = -2 if mode in {"constant", "replicate"} else 0
    return f"x = F.pad(x, {d.each(2 * n, low, 3)}, {mode!r})"


@op("stencil")
def unfold(d: Draw, x: Tensor) -> str:
    kernel, dilation, padding, stride = (d.each(2, lo, hi) for lo, hi in ((1, 3), (1, 2), (0, 2), (1, 3)))
    if x.ndim != 4:
        dim = d.dim(x)
        return f"x = x.unfold({dim}, {d.int(1, min(4, x.shape[dim]))}, {d.int(1, 3)})"
    step = f"x = F.unfold(x, {kernel}, {dilation}, {padding}, {stride})"
    if d.maybe():
        step += f"; x = F.fold(x, {tuple(x.shape[-2:])}, {kernel}, {dilation}, {padding}, {stride})"
    return step


@op("stencil")
def shuffle(d: Draw, x: Tensor) -> str:
    return d.of(
        "x = F.pixel_shuffle(x, 2)", "x = F.pixel_unshuffle(x, 2)", f"x = F.channel_shuffle(x, {d.int(1, 3)})",
        f"x = F.pixel_unshuffle(x, {d.int(2, 3)})",
    )  # fmt: skip


# --- resize


@op("resize")
def interpolate(d: Draw, x: Tensor) -> str:
    n = d.spatial(x)
    smooth = {1: ("linear",), 2: ("bilinear", "bicubic"), 3: ("trilinear",)}[n]
    mode = d.of("nearest", "nearest-exact", "area", *smooth, *smooth)
    sizes: Any = d.each(n, 1, 10)
    to = f"size={sizes}"
    if d.maybe():
        factors = d.of((2,) * n, (0.5,) * n, (1.5,) * n, tuple(d.of(0.5, 0.7, 1.0, 1.3, 2.0) for _ in range(n)))
        sizes = [int(size * factor) for size, factor in zip(x.shape[2:], factors)]
        to = f"scale_factor={factors}" + d.of("", ", recompute_scale_factor=True")
    options = f", align_corners={d.maybe()}" if mode in smooth else ""
    if mode in {"bilinear", "bicubic"} and sizes[-1] > 1:  # torch 2.13 resizes to one column wrongly
        options += d.of("", ", antialias=True")
    return f"x = F.interpolate(x, {to}, mode={mode!r}{options})"


@op("resize")
def grid_sample(d: Draw, x: Tensor) -> str:
    n = d.spatial(x, 2)
    sizes = d.each(n, 1, 6) if d.maybe() else tuple(x.shape[2:])
    grid = d.operand((x.shape[0], *sizes, n))
    mode, padding = d.of("bilinear", "nearest"), d.of("zeros", "border", "reflection")
    return f"x = F.grid_sample(x, {grid}.tanh(), {mode!r}, {padding!r}, {d.maybe()})"


@op("resize")
def affine_grid(d: Draw, x: Tensor) -> str:
    n = d.spatial(x, 2)
    size = (*x.shape[:2], *d.each(n, 1, 6))
    return (
        f"x = F.grid_sample(x, F.affine_grid({d.operand((x.shape[0], n, n + 1))}, {size}, False), align_corners=False)"
    )


@op("resize")
def upsample_by_hand(d: Draw, x: Tensor) -> str:
    return f"x = x.repeat_interleave({d.int(2, 3)}, {d.dim(x)})"
