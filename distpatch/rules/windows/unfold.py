"""Windows as a dim of their own (unfold, fold), and pixels as channels (pixel and channel shuffle)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distpatch.errors import LayoutError
from distpatch.layout.rows import aligned_bounds
from distpatch.layout.stencil import TransposedStencil, WindowStencil
from distpatch.rules.core.aliasing import copied
from distpatch.rules.core.halo import batched, fixed, paddings, run_stencil, run_windows
from distpatch.rules.core.operands import per_dim
from distpatch.rules.core.redistribution import redistribute
from distpatch.rules.core.registry import named, nth, rule
from distpatch.rules.core.wrapping import beside_rows, on_some_rows, wrap
from distpatch.rules.windows.transposed import written
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.op_names import op_name

Sizes = int | Sequence[int]


@rule(F.unfold, asks_if_empty=True)
@batched(4)
def unfold(
    func: Any,
    input: PatchTensor,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    padding: Sizes = 0,
    stride: Sizes = 1,
) -> Any:
    """(N, C, H, W) to (N, C * window, L): L counts the windows row by row, so it is sharded as the rows are.

    Along the width some of each row of windows are a rank's, which are blocks of L.
    """
    kernel, dilations, pads, strides = (per_dim(fixed(n), 2) for n in (kernel_size, dilation, padding, stride))
    if input.row_layout.dim < 2:  # whole images, or channels, which stay one after the other
        local = on_some_rows(
            lambda rows: func(rows, kernel, dilations, pads, strides), input.local, input.row_layout.dim
        )
        return _repeated(input, local, kernel[0] * kernel[1] if input.row_layout.dim == 1 else 1)
    axis = input.row_layout.dim - 2
    windows = [WindowStencil(k, s, p, p, d) for k, s, p, d in zip(kernel, strides, pads, dilations)]

    def blocks(rows: Tensor, start: int, lo: int, hi: int) -> Tensor:
        pad = paddings(windows, axis, start, lo)
        return rearrange(func(rows, kernel, dilations, pad, strides), "n c (h w) -> n c h w", **{"hw"[axis]: hi - lo})

    return run_windows(func, input, windows, blocks).flatten(2)


@rule(F.fold, any_order=True, asks_if_empty=True)
@batched(3)
def fold(
    func: Any,
    input: PatchTensor,
    output_size: Sizes,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    padding: Sizes = 0,
    stride: Sizes = 1,
) -> Any:
    """(N, C * window, L) to (N, C, H, W): each row sums what the windows over it hold for it."""
    size, kernel, dilations, pads, strides = (
        per_dim(fixed(n), 2) for n in (output_size, kernel_size, dilation, padding, stride)
    )
    if input.row_layout.dim < 2:
        pixels = kernel[0] * kernel[1] if input.row_layout.dim == 1 else 1
        x = _aligned(input, pixels, func)
        local = on_some_rows(
            lambda rows: func(rows, size, kernel, dilations, pads, strides), x.local, x.row_layout.dim, pixels
        )
        return _repeated(x, local, 1, pixels)
    windows = [WindowStencil(k, s, p, p, d) for k, s, p, d in zip(kernel, strides, pads, dilations)]
    blocks = [window.out_rows(n) for window, n in zip(windows, size, strict=True)]
    x = cast(PatchTensor, input.unflatten(2, blocks))
    axis = x.row_layout.dim - 2
    stencil = TransposedStencil(kernel[axis], strides[axis], pads[axis], dilations[axis])
    stencil = replace(stencil, extra=size[axis] - stencil.out_rows(blocks[axis]))

    def write(rows: Tensor, cut: int, more: int) -> Tensor:
        length = (rows.shape[2 + axis] - 1) * stencil.stride + stencil.span - 2 * cut + more
        sizes = [length if d == axis else n for d, n in enumerate(size)]
        cuts = [cut if d == axis else n for d, n in enumerate(pads)]
        image: Tensor = func(rearrange(rows, "n c h w -> n c (h w)"), sizes, kernel, dilations, cuts, strides)
        return image

    return run_stencil(func, x, stencil, lambda rows, *place: written(write, stencil, rows, 2 + axis, *place))


@rule(torch.Tensor.unfold, view=True, asks_if_empty=True)
def windows_of_dim(func: Any, input: PatchTensor, dimension: int, size: int, step: int) -> Tensor:
    at = nth(dimension, input.ndim)
    if at != input.row_layout.dim:
        return wrap(input.local.unfold(at, size, step), input)
    stencil = WindowStencil(size, step)
    if stencil.out_rows(input.row_layout.size) < 1:
        raise LayoutError(f"{op_name(func)}: an input of shape {tuple(input.shape)} has no room for a window")
    windows = run_stencil(func, input, stencil, lambda rows, start, lo, hi: rows.unfold(at, size, step), view=True)
    return copied(windows, input, func)


@rule(*named("pixel_shuffle", "pixel_unshuffle"), asks_if_empty=True)
def pixel_shuffle(func: Any, input: PatchTensor, factor: int) -> PatchTensor:
    """(*, C * r * r, H, W) to (*, C, H * r, W * r), or back; rows or channels that become one go to one rank."""
    kinds = {input.ndim - 3: (1, factor * factor), input.ndim - 2: (factor, 1), input.ndim - 1: (factor, 1)}
    times, unit = kinds.get(input.row_layout.dim, (1, 1))  # how many rows become how many: (out, in)
    if op_name(func) == "pixel_unshuffle":
        times, unit = unit, times
    x = _aligned(input, unit, func)
    local = on_some_rows(lambda rows: func(rows, factor), x.local, x.row_layout.dim, unit)
    return _repeated(x, local, times, unit)


@rule(*named("channel_shuffle", "native_channel_shuffle"), keeps_format=True)
def channel_shuffle(func: Any, input: PatchTensor, groups: int) -> Any:
    if input.row_layout.dim == 1:
        return NotImplemented
    return beside_rows(func, input, groups)


def _aligned(x: PatchTensor, unit: int, func: Any) -> PatchTensor:
    """The tensor, so distributed that ``unit`` rows which become one are on one rank."""
    if x.row_layout.size % unit:
        raise LayoutError(
            f"{op_name(func)} makes one of each {unit} along dim {x.row_layout.dim}, but the input's shape is "
            f"{tuple(x.shape)}"
        )
    return redistribute(x, x.row_layout.with_bounds(aligned_bounds(x.row_layout.bounds, unit)), func)


def _repeated(x: PatchTensor, local: Tensor, times: int, unit: int = 1) -> PatchTensor:
    """Every ``unit`` rows of ``x`` have become ``times``."""
    return wrap(local, x, x.row_layout.with_bounds(tuple(bound // unit * times for bound in x.row_layout.bounds)))
