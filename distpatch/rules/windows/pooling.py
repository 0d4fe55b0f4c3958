"""Pooling by sliding windows: max (with the indices of one device), mean, power mean, and unpooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.errors import LayoutError
from distpatch.layout.stencil import TransposedStencil, WindowStencil
from distpatch.layout.transfers import plan_rank
from distpatch.rules.core.halo import fixed, paddings, run_windows, spatial_dims
from distpatch.rules.core.operands import per_dim, precise
from distpatch.rules.core.redistribution import gather_partial, redistribute
from distpatch.rules.core.registry import first_dim, named, rule
from distpatch.rules.core.wrapping import wrap
from distpatch.tensor.patch_tensor import PatchTensor, shard_in
from distpatch.torch_utils.op_names import op_name

Sizes = int | Sequence[int]


@rule(*named(*(f"max_pool{n}d{suffix}" for n in (1, 2, 3) for suffix in ("", "_with_indices"))), order_free=first_dim)
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
    windows, axis, dim = _windows(
        func, input, kernel_size, stride or kernel_size, padding, dilation, ceil_mode=ceil_mode
    )
    return_indices |= op_name(func).endswith("indices")
    plain, strides = getattr(F, f"max_pool{len(windows)}d"), [window.stride for window in windows]

    def pool(rows: Tensor, start: int, lo: int, hi: int) -> Any:
        pads = paddings(windows, axis, start, lo)
        return plain(rows, kernel_size, strides, pads, dilation, ceil_mode, return_indices)

    def pool_with_indices(rows: Tensor, start: int, lo: int, hi: int) -> tuple[Tensor, ...]:
        if axis < 0:
            pooled: tuple[Tensor, ...] = pool(rows, start, lo, hi)
            return pooled
        above, first = max(-start, 0), 0 if start < 0 else lo
        rows = rows.narrow(dim, above, rows.shape[dim] - above)
        values, indices = pool(
            rows, start + above, first, hi
        )  # torch's own padding: where all is -inf, the index is in the image
        indices = global_indices(indices, rows, dim, start + above, input)
        return tuple(t.narrow(dim, lo - first, hi - lo) for t in (values, indices))

    lowest = -math.inf if input.dtype.is_floating_point else torch.iinfo(input.dtype).min
    kernel = pool_with_indices if return_indices else pool
    return run_windows(func, input, windows, kernel, fill=lowest, pads=not return_indices)


@rule(*named("avg_pool1d", "avg_pool2d", "avg_pool3d"), order_free=first_dim)
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
    if not input.dtype.is_floating_point:  # a mean of whole numbers is rounded once
        return NotImplemented
    windows, axis, dim = _windows(func, input, kernel_size, stride or kernel_size, padding, 1, ceil_mode=ceil_mode)
    strides, window = [each.stride for each in windows], windows[max(axis, 0)]
    how = (ceil_mode, count_include_pad, *([divisor_override] if len(windows) > 1 else []))
    outside = window.before if count_include_pad else 0
    first, end = -outside, input.shape[dim] + outside

    def pool(rows: Tensor, start: int, lo: int, hi: int) -> Tensor:
        pads = paddings(windows, axis, start, lo)
        if axis < 0 or divisor_override is not None or (first <= start and start + rows.shape[dim] <= end):
            result: Tensor = func(rows, kernel_size, strides, pads, *how)
            return result
        means = func(rows.to(precise(rows.dtype)), kernel_size, strides, pads, *how)
        top = torch.arange(lo, hi, device=rows.device) * window.stride - window.before
        counted = (top + window.kernel).clamp(max=end) - top.clamp(min=first)
        share = (window.kernel / counted.to(means.dtype)).view([-1] + [1] * (input.ndim - 1 - dim))
        return (means * share).to(rows.dtype)

    return run_windows(func, input, windows, pool)


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
    kernel, strides, pads = (per_dim(fixed(n), spatial) for n in (kernel_size, stride or kernel_size, padding))
    sizes = F._unpool_output_size(input, kernel, strides, pads, output_size)[-spatial:]  # type: ignore[attr-defined]
    if not isinstance(indices, PatchTensor):
        indices = shard_in(input.region, indices, input.row_layout)
    if axis < 0:
        local = redistribute(indices, input.row_layout, func).local
        return wrap(_scattered(input.local, local, sizes), input)
    stencil = TransposedStencil(kernel[axis], strides[axis], pads[axis])
    extra = sizes[axis] - stencil.out_rows(input.row_layout.size)
    stencil = TransposedStencil(kernel[axis], strides[axis], pads[axis], 1, extra)
    plan = plan_rank(input.row_layout, stencil, input.region.comm.rank)
    lo, hi = plan.rows
    values, index = gather_partial(input, func), gather_partial(indices, func)
    inner = math.prod(sizes[axis + 1 :])
    row = index // inner % sizes[axis]
    row = torch.where((row >= lo) & (row < hi), row - lo, hi - lo)  # one row more takes what is others'
    index = (index // (inner * sizes[axis]) * (hi - lo + 1) + row) * inner + index % inner
    local = _scattered(values, index, [hi - lo + 1 if d == axis else n for d, n in enumerate(sizes)])
    return wrap(local.narrow(dim, 0, hi - lo), input, plan.layout)


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


def _windows(func: Any, x: PatchTensor, *numbers: Any, ceil_mode: bool) -> tuple[tuple[WindowStencil, ...], int, int]:
    """One a spatial dim; which of these is sharded (below 0: none), and the sharded dim."""
    windows = _stencils(func, x.shape, *map(fixed, numbers), ceil_mode)
    return windows, x.row_layout.dim - x.ndim + len(windows), x.row_layout.dim


@lru_cache(maxsize=4096)
def _stencils(
    func: Any, shape: torch.Size, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil_mode: bool
) -> tuple[WindowStencil, ...]:
    numbers = [per_dim(n, spatial_dims(func)) for n in (kernel, stride, padding, dilation)]
    windows = tuple(WindowStencil(k, s, p, p, d, ceil_mode) for k, s, p, d in zip(*numbers, strict=True))
    if any(2 * window.before > window.span for window in windows):
        raise LayoutError(
            f"{op_name(func)}: an input of shape {tuple(shape)} with kernel {kernel}, padding {padding} and dilation "
            f"{dilation}: padding may be at most half of the (dilated) kernel"
        )
    return windows
