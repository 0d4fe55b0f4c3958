"""Transposed convolution over the sharded dim: each output row sums what the input rows near it write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from distpatch.errors import LayoutError
from distpatch.layout.rows import RowLayout
from distpatch.layout.stencil import TransposedStencil
from distpatch.layout.transfers import plan_stencil
from distpatch.lazy.row_patches import Slab, choose_patch_rows, in_patches
from distpatch.rules.core.halo import halo
from distpatch.rules.core.operands import along_rows, in_compute_dtype, per_dim, replicated_operand, wrap
from distpatch.rules.core.registry import named, rule
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils.op_names import op_name

Sizes = int | Sequence[int]
Write = Callable[[Tensor, int, int], Tensor]  # (rows, rows to cut off at both ends, rows to add below)


@rule(*named("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), of_many_kernels=True)
def transposed_convolution(
    func: Any,
    input: PatchTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Any:
    how = (stride, padding, output_padding, groups, dilation)
    spatial = weight.ndim - 2
    weight, bias = gather_replicated(weight), None if bias is None else gather_replicated(bias)
    if not isinstance(input, PatchTensor):
        return func(input, weight, bias, *how)
    if input.ndim == spatial + 1:  # unbatched
        return transposed_convolution(func, cast(PatchTensor, input.unsqueeze(0)), weight, bias, *how).squeeze(0)
    input = along_rows(input, func)
    axis = input.row_layout.dim - 2
    input, weight = in_compute_dtype(input), replicated_operand(weight, input)
    bias = None if bias is None else replicated_operand(bias, input)
    if axis == -2:
        return wrap(func(input.local, weight, bias, *how), input)
    strides, pads, extras, dilations = (per_dim(n, spatial) for n in (stride, padding, output_padding, dilation))
    windows = [
        TransposedStencil(*numbers) for numbers in zip(weight.shape[2:], strides, pads, dilations, extras, strict=True)
    ]
    sizes = [window.out_rows(n) for window, n in zip(windows, input.shape[2:], strict=True)]
    if min(sizes) < 1 or any(e >= max(s, d) for e, s, d in zip(extras, strides, dilations, strict=True)):
        raise LayoutError(
            f"{op_name(func)}: an input of shape {tuple(input.shape)} with kernel {tuple(weight.shape[2:])}, "
            f"stride {stride}, padding {padding}, dilation {dilation} and output_padding {output_padding} "
            f"gives an output of {sizes}; output_padding must be smaller than the stride or the dilation"
        )
    plan, region = plan_stencil(input.row_layout.bounds, windows[axis]), input.region
    lo, hi = out = plan.out[region.comm.rank], plan.out[region.comm.rank + 1]

    def write(rows: Tensor, cut: int, more: int) -> Tensor:
        cuts = [cut if d == axis else pad for d, pad in enumerate(pads)]
        adds = [more if d == axis else extra for d, extra in enumerate(extras)]
        return func(rows, weight, bias, strides, cuts, adds, groups, dilations)

    channels = weight.shape[1] * groups
    out_numel = input.shape[0] * channels * math.prod(sizes) // sizes[axis] * (hi - lo)
    patch_rows = choose_patch_rows(
        region.splits, hi - lo, input.local_or_recipe, weight, out_numel, region.min_numel, region.workspace_bytes
    )
    slab = halo(input, plan.needs, func)
    result = in_patches(lambda a, b: written(write, slab, windows[axis], a, b), out, patch_rows, slab.dim)
    return wrap(result, input, RowLayout(slab.dim, plan.out))


def written(write: Write, slab: Slab, stencil: TransposedStencil, lo: int, hi: int) -> Tensor:
    """Output rows [lo, hi): those that the input rows near them write, less what these write elsewhere."""
    if lo == hi:
        return write(slab.blank(1), 0, 0).narrow(slab.dim, 0, 0)
    first, stop = stencil.need(lo, hi)
    rows = slab.rows(first, stop)
    above = lo - (first * stencil.stride - stencil.before)
    if first == stop or above < 0:  # nobody writes row lo: a row of zeros does
        rows = torch.cat([slab.blank(1), rows], slab.dim)
        above += stencil.stride
    below = (stop - 1) * stencil.stride - stencil.before + stencil.span - hi
    cut = max(min(above, below), 0)
    return write(rows, cut, max(-below, 0)).narrow(slab.dim, above - cut, hi - lo)
