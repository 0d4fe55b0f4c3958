"""Convolution over the sharded dim: the halo rows its windows reach are fetched, the rest is local."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.errors import LayoutError
from distpatch.layout.stencil import WindowStencil
from distpatch.layout.transfers import plan_stencil
from distpatch.lazy.deferred_ops import unchanged
from distpatch.lazy.recipe import Recipe
from distpatch.lazy.row_patches import choose_patch_rows, convolve, deferred_conv
from distpatch.rules.core.halo import halo
from distpatch.rules.core.operands import (
    along_rows,
    can_defer,
    in_compute_dtype,
    materialize_if_costly,
    per_dim,
    replicated_operand,
    wrap,
)
from distpatch.rules.core.registry import named, rule
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils.memory_format import memory_format
from distpatch.torch_utils.op_names import op_name

Sizes = int | Sequence[int]


@rule(*named("conv1d", "conv2d", "conv3d"), of_many_kernels=True)
def convolution(
    func: Any,
    input: PatchTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Any:
    spatial = weight.ndim - 2
    weight = gather_replicated(weight)  # a model may make one of an image: x.new_ones(1, 1, 3, 3)
    bias = None if bias is None else gather_replicated(bias)
    if not isinstance(input, PatchTensor):
        return func(input, weight, bias, stride, padding, dilation, groups)
    if input.ndim == spatial + 1:  # unbatched
        batch = cast(PatchTensor, input.unsqueeze(0))
        return convolution(func, batch, weight, bias, stride, padding, dilation, groups).squeeze(0)
    input = along_rows(input, func)
    axis = input.row_layout.dim - 2
    input, weight = in_compute_dtype(input), replicated_operand(weight, input)
    bias = None if bias is None else replicated_operand(bias, input)
    if axis == -2:
        return wrap(func(input.local, weight, bias, stride, padding, dilation, groups), input)
    kernel, strides, dilations = weight.shape[2:], per_dim(stride, spatial), per_dim(dilation, spatial)
    before, after = _paddings(padding, kernel, dilations, strides)
    extra = [0 if d == axis else after[d] - before[d] for d in range(spatial)]
    if any(extra):  # padding="same" with an even kernel: one more on the far side
        input = cast(PatchTensor, F.pad(input, [n for more in reversed(extra) for n in (0, more)]))
        after = tuple(after[d] - more for d, more in enumerate(extra))
    windows = [WindowStencil(*numbers) for numbers in zip(kernel, strides, before, after, dilations, strict=True)]
    plan, rank = plan_stencil(input.row_layout.bounds, windows[axis]), input.region.comm.rank
    lo, hi = plan.out[rank : rank + 2]
    sizes = [deferred_conv.out_rows(n) for deferred_conv, n in zip(windows, input.shape[2:], strict=True)]
    if min(sizes) < 1:
        raise LayoutError(
            f"{op_name(func)}: an input of shape {tuple(input.shape)} is smaller than the kernel "
            f"{tuple(kernel)} with padding {padding} and dilation {dilation}"
        )

    region = input.region
    outer = [input.shape[0], weight.shape[0], *sizes]
    outer[input.row_layout.dim] = hi - lo
    patch_rows = choose_patch_rows(
        region.splits,
        hi - lo,
        input.local_or_recipe,
        weight,
        math.prod(outer),
        region.min_numel,
        region.workspace_bytes,
    )
    waits = patch_rows < hi - lo and region.sequential and _can_defer(input, weight, bias, groups, math.prod(outer))
    if waits:  # once computed, what was convolved may be gone or changed: these are its weights now
        weight, bias = weight.detach(), None if bias is None else bias.detach()

    check = unchanged(op_name(func), weight, bias) if waits else None

    def conv(rows: Tensor, row_padding: int) -> Tensor:
        if check is not None:
            check()
        pads = [row_padding if d == axis else pad for d, pad in enumerate(before)]
        return func(rows, weight, bias, strides, pads, dilations, groups)

    result: Tensor | Recipe
    slab = halo(materialize_if_costly(input) if waits else input, plan.needs, func, wait=waits)
    if waits:
        format = memory_format(weight)  # of the result, if it is not the input's
        format = input.as_recipe.format if format is torch.contiguous_format else format
        result = deferred_conv(op_name(func), conv, slab, windows[axis], (lo, hi), outer, format, patch_rows)
    else:
        result = convolve(conv, slab, windows[axis], (lo, hi), patch_rows, region.sequential)
    return wrap(result, input, input.row_layout.with_bounds(plan.out))


def _can_defer(input: PatchTensor, weight: Tensor, bias: Tensor | None, groups: int, out_numel: int) -> bool:
    """Whether a convolution may be computed later: nothing can be wrong with it then."""
    channels = weight.shape[1] * groups == input.shape[1] and weight.shape[0] % groups == 0
    fits = channels and all(t is None or (t.dtype, t.device) == (input.dtype, input.device) for t in (weight, bias))
    return fits and can_defer(input, out_numel * weight.element_size())


def _paddings(
    padding: Sizes | str, kernel: Sequence[int], dilations: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zero rows before and after, per spatial dim; torch puts an odd one of "same" behind."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        if any(stride != 1 for stride in strides):
            raise RuntimeError("padding='same' is not supported for strided convolutions")
        total = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    assert not isinstance(padding, str), padding
    pads = per_dim(padding, len(kernel))
    return pads, pads
