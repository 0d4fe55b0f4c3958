"""Pooling by sliding windows: max (with the indices of one device), mean, power mean, and unpooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.errors import LayoutError
from distpatch.layout.stencil import TransposedStencil, WindowStencil, ceil_div
from distpatch.layout.transfers import plan_stencil
from distpatch.lazy.row_patches import convolve, fewest_calls
from distpatch.rules.core.halo import run_stencil, slab_of
from distpatch.rules.core.operands import gather_partial, on_some_rows, per_dim, redistribute, wrap
from distpatch.rules.core.registry import named, rule
from distpatch.rules.windows.filters import precise
from distpatch.tensor.patch_tensor import PatchTensor, shard_in
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors

Sizes = int | Sequence[int]


def spatial_dims(func: Any) -> int:
    """2 of ``max_pool2d``."""
    return next(int(letter) for letter in op_name(func) if letter.isdigit())


@rule(*named(*(f"max_pool{n}d{suffix}" for n in (1, 2, 3) for suffix in ("", "_with_indices"))))
def max_pool(
    func: Any,
    input: PatchTensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    windows = _windows(func, input, kernel_size, stride, padding, dilation, ceil_mode)
    spatial, dim = len(windows), input.row_layout.dim
    axis, plain = dim - input.ndim + spatial, getattr(F, f"max_pool{spatial}d")
    return_indices |= op_name(func).endswith("indices")
    strides = [window.stride for window in windows]

    def pool(rows: Tensor, row_padding: int) -> Any:
        pads = [row_padding if d == axis else window.before for d, window in enumerate(windows)]
        return plain(rows, kernel_size, strides, pads, dilation, ceil_mode, return_indices)

    def pool_with_indices(rows: Tensor, start: int, lo: int, hi: int) -> tuple[Tensor, ...]:
        first, above = (0, windows[axis].before) if start < 0 else (lo, 0)
        rows = rows.narrow(dim, max(-start, 0), rows.shape[dim] - max(-start, 0))
        values, indices = pool(rows, above)  # torch's own padding: where all is -inf, the index is in the image
        indices = global_indices(indices, rows, dim, max(start, 0), input)
        return tuple(t.narrow(dim, lo - first, hi - lo) for t in (values, indices))

    if axis < 0:
        local = on_some_rows(lambda rows: pool(rows, 0), input.local, dim)
        return map_tensors(lambda t: wrap(t, input), local)
    lowest = -math.inf if input.dtype.is_floating_point else torch.iinfo(input.dtype).min
    if return_indices:
        return run_stencil(pool_with_indices, input, windows[axis], func, lowest)
    slab, out, layout = slab_of(input, windows[axis], func, lowest)
    patch_rows = ceil_div(max(out[1] - out[0], 1), fewest_calls(input.local.numel()))
    return wrap(convolve(pool, slab, windows[axis], out, patch_rows, True), input, layout)


@rule(*named("avg_pool1d", "avg_pool2d", "avg_pool3d"))
def avg_pool(
    func: Any,
    input: PatchTensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Each mean is over a whole window, then corrected for the rows of it that should not count."""
    windows = _windows(func, input, kernel_size, stride, padding, 1, ceil_mode)
    spatial, dim = len(windows), input.row_layout.dim
    axis = dim - input.ndim + spatial
    strides = [window.stride for window in windows]
    pads = [0 if d == axis else window.before for d, window in enumerate(windows)]
    how = (ceil_mode, count_include_pad, *([divisor_override] if spatial > 1 else []))
    if axis < 0:
        local = on_some_rows(lambda rows: func(rows, kernel_size, strides, pads, *how), input.local, dim)
        return wrap(local, input)
    window = windows[axis]
    outside = window.before if count_include_pad else 0
    first, end = -outside, input.row_layout.size + outside

    def pool(rows: Tensor, start: int, lo: int, hi: int) -> Tensor:
        if divisor_override is not None or (first <= start and start + rows.shape[dim] <= end):
            return func(rows, kernel_size, strides, pads, *how)
        means = func(rows.to(precise(rows.dtype)), kernel_size, strides, pads, *how)
        top = torch.arange(lo, hi, device=rows.device) * window.stride - window.before
        counted = (top + window.kernel).clamp(max=end) - top.clamp(min=first)
        share = (window.kernel / counted.to(means.dtype)).view([-1] + [1] * (input.ndim - 1 - dim))
        return (means * share).to(rows.dtype)

    return run_stencil(pool, input, window, func)


@rule(*named("max_unpool1d", "max_unpool2d", "max_unpool3d"))
def max_unpool(
    func: Any,
    input: PatchTensor,
    indices: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    output_size: Any = None,
) -> Any:
    """Indices may point to any row, and reading them would wait for the device: every rank takes all the
    values, and keeps those of its rows. The output, which is larger, is not gathered."""
    spatial, dim = spatial_dims(func), input.row_layout.dim
    axis = dim - input.ndim + spatial
    kernel, strides, pads = (per_dim(n, spatial) for n in (kernel_size, stride or kernel_size, padding))
    sizes = F._unpool_output_size(input, kernel, strides, pads, output_size)[-spatial:]  # type: ignore[attr-defined]
    if not isinstance(indices, PatchTensor):
        indices = shard_in(input.region, indices, input.row_layout)
    if axis < 0:
        local = redistribute(indices, input.row_layout, func).local
        return wrap(_scattered(input.local, local, sizes), input)
    stencil = TransposedStencil(kernel[axis], strides[axis], pads[axis])
    extra = sizes[axis] - stencil.out_rows(input.row_layout.size)
    stencil = TransposedStencil(kernel[axis], strides[axis], pads[axis], 1, extra)
    bounds, rank = plan_stencil(input.row_layout.bounds, stencil).out, input.region.comm.rank
    lo, hi = bounds[rank], bounds[rank + 1]
    values, index = gather_partial(input, func), gather_partial(indices, func)
    inner = math.prod(sizes[axis + 1 :])
    row = index // inner % sizes[axis]
    row = torch.where((row >= lo) & (row < hi), row - lo, hi - lo)  # one row more takes what is others'
    index = (index // (inner * sizes[axis]) * (hi - lo + 1) + row) * inner + index % inner
    local = _scattered(values, index, [hi - lo + 1 if d == axis else n for d, n in enumerate(sizes)])
    return wrap(local.narrow(dim, 0, hi - lo), input, input.row_layout.with_bounds(bounds))


def _scattered(values: Tensor, index: Tensor, sizes: Sequence[int]) -> Tensor:
    """The values at their places in an image of these sizes; torch's own unpooling refuses an empty one."""
    inner = -len(sizes)
    shape = [*values.shape[:inner], *sizes]
    pixels = values.new_zeros(shape).flatten(inner)
    return pixels.scatter(-1, index.flatten(inner), values.flatten(inner)).view(shape)


def global_indices(indices: Tensor, rows: Tensor, dim: int, start: int, image: PatchTensor) -> Tensor:
    """Flat indices into ``rows``, the image from row ``start`` on, as flat indices into the whole image."""
    inner = math.prod(rows.shape[dim + 1 :])
    row = indices // inner % rows.shape[dim] + start
    return (indices // (inner * rows.shape[dim]) * image.row_layout.size + row) * inner + indices % inner


def _windows(
    func: Any,
    x: PatchTensor,
    kernel: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
) -> list[WindowStencil]:
    """One a spatial dim. Raises ``LayoutError`` where torch would refuse them."""
    spatial = spatial_dims(func)
    numbers = [per_dim(n, spatial) for n in (kernel, stride or kernel, padding, dilation)]
    windows = [WindowStencil(k, s, p, p, d, ceil_mode) for k, s, p, d in zip(*numbers, strict=True)]
    sizes = [window.out_rows(n) for window, n in zip(windows, x.shape[-spatial:], strict=True)]
    if min(sizes) < 1 or any(2 * window.before > window.span for window in windows):
        raise LayoutError(
            f"{op_name(func)}: an input of shape {tuple(x.shape)} with kernel {kernel}, stride {stride}, "
            f"padding {padding} and dilation {dilation} gives an output of {sizes}; padding may be at most "
            "half of the (dilated) kernel"
        )
    return windows
