"""Convolution over the sharded dim: the halo rows its windows reach are fetched, the rest is local."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from distpatch.layout.stencil import WindowStencil
from distpatch.rules.core.halo import Weights, batched, convolved, paddings, run_windows
from distpatch.rules.core.operands import per_dim
from distpatch.rules.core.registry import named, rule
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated

Sizes = int | Sequence[int]


@rule(*named("conv1d", "conv2d", "conv3d"), of_many_kernels=True)
@batched()
def convolution(
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Any:
    if not isinstance(input, PatchTensor):  # a model may make a weight of an image: x.new_ones(1, 1, 3, 3)
        bias = None if bias is None else gather_replicated(bias)
        return func(input, gather_replicated(weight), bias, stride, padding, dilation, groups)
    input, weight, bias = convolved(func, input, weight, bias)
    kernel, spatial = weight.shape[2:], weight.ndim - 2
    axis, strides, dilations = input.row_layout.dim - 2, per_dim(stride, spatial), per_dim(dilation, spatial)
    before, after = _paddings(padding, kernel, dilations, strides)
    if before != after:
        input, after = _pad_far_side(input, axis, before, after)
    windows = [WindowStencil(*numbers) for numbers in zip(kernel, strides, before, after, dilations, strict=True)]

    def conv(rows: Tensor, start: int, lo: int, hi: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        pads = paddings(windows, axis, start, lo)
        result: Tensor = func(rows, weight, bias, strides, pads, dilations, groups)
        return result

    fit = weight.shape[1] * groups == input.shape[1] and weight.shape[0] % groups == 0
    weights = Weights(weight, bias, weight.shape[0], fit)
    return run_windows(func, input, windows, conv, pads=True, weights=weights)


def _pad_far_side(
    x: PatchTensor, axis: int, before: Sequence[int], after: Sequence[int]
) -> tuple[PatchTensor, tuple[int, ...]]:
    """ "same" with an even kernel: one more on the far side, of all dims but the rows."""
    more = [0 if d == axis else stop - start for d, (start, stop) in enumerate(zip(before, after))]
    if any(more):
        x = cast(PatchTensor, F.pad(x, [n for extra in reversed(more) for n in (0, extra)]))
    return x, tuple(stop - extra for stop, extra in zip(after, more))


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
