"""Transposed convolution over the sharded dim: each output row sums what the input rows near it write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from distpatch.errors import LayoutError
from distpatch.layout.stencil import TransposedStencil
from distpatch.lazy.row_patches import with_dummy_row
from distpatch.rules.core.halo import Weights, batched, carry_out, convolved, fixed, given
from distpatch.rules.core.operands import per_dim
from distpatch.rules.core.registry import named, rule
from distpatch.rules.core.window_plan import Given, WindowPlan, plan_windows
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils.op_names import op_name

Sizes = int | Sequence[int]
Write = Callable[[Tensor, int, int], Tensor]  # (rows, rows to cut off at both ends, rows to add below)


@rule(*named("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), of_many_kernels=True)
@batched()
def transposed_convolution(
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Any:
    if not isinstance(input, PatchTensor):
        bias = None if bias is None else gather_replicated(bias)
        return func(input, gather_replicated(weight), bias, stride, padding, output_padding, groups, dilation)
    input, weight, bias = convolved(func, input, weight, bias)
    stride, padding, dilation, extra = fixed(stride), fixed(padding), fixed(dilation), fixed(output_padding)
    windows, plan = _plan(op_name(func), given(input, weight), groups, stride, padding, dilation, extra)
    axis = max(plan.axis, 0)

    def kernel(rows: Tensor, start: int, lo: int, hi: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        def write(rows: Tensor, cut: int, more: int) -> Tensor:
            cuts = [cut if d == axis else window.before for d, window in enumerate(windows)]
            adds = [more if d == axis else window.extra for d, window in enumerate(windows)]
            result: Tensor = func(rows, weight, bias, stride, cuts, adds, groups, dilation)
            return result

        return written(write, windows[axis], rows, axis + 2, start, lo, hi)

    return carry_out(plan, func, input, kernel, weights=Weights(weight, bias))


@lru_cache(maxsize=4096)
def _plan(
    op: str, given: Given, groups: int, stride: Sizes, padding: Sizes, dilation: Sizes, output_padding: Sizes
) -> tuple[tuple[TransposedStencil, ...], WindowPlan]:
    kernel = given.weight[2:]
    numbers = [per_dim(n, len(kernel)) for n in (stride, padding, dilation, output_padding)]
    windows = tuple(TransposedStencil(*each) for each in zip(kernel, *numbers, strict=True))
    if any(window.extra >= max(window.stride, window.dilation) for window in windows):
        raise LayoutError(
            f"{op}: output_padding {output_padding} must be smaller than the stride {stride} or the "
            f"dilation {dilation}, for an input of shape {tuple(given.shape)}"
        )
    return windows, plan_windows(op, given, windows, channels=given.weight[1] * groups)


def written(write: Write, stencil: TransposedStencil, rows: Tensor, dim: int, start: int, lo: int, hi: int) -> Tensor:
    """Output rows [lo, hi): those that the input rows near them write, less what these write elsewhere."""
    stop = start + rows.shape[dim]
    above = lo - (start * stencil.stride - stencil.before)
    if start == stop or above < 0:  # nobody writes row lo: a row of zeros does
        rows = torch.cat([with_dummy_row(rows.narrow(dim, 0, 0), dim), rows], dim)
        above += stencil.stride
    below = (stop - 1) * stencil.stride - stencil.before + stencil.span - hi
    cut, more = max(min(above, below), 0), max(-below, 0)
    if 0 < above - below < max(stencil.stride, stencil.dilation):  # as torch has it, of a whole image
        cut, more = above, above - below
    result = write(rows, cut, more)
    return result if result.shape[dim] == hi - lo else result.narrow(dim, above - cut, hi - lo)
