"""Convolution over the sharded dim: the halo rows its windows reach are fetched, the rest is local."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.layout.stencil import WindowStencil
from distpatch.rules.core.halo import Weights, batched, carry_out, convolved, fixed, given, paddings
from distpatch.rules.core.operands import per_dim
from distpatch.rules.core.registry import named, rule
from distpatch.rules.core.window_plan import Given, WindowPlan, plan_windows
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils.convolution_kernel import convolve, may_gain
from distpatch.torch_utils.op_names import op_name

Sizes = int | Sequence[int]


def _is_order_free(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, *_: Any, **__: Any
) -> bool:
    """Whether samples are sharded, or a dim along which the kernel sees one place of the input alone."""
    if not isinstance(input, PatchTensor) or input.ndim != weight.ndim or isinstance(padding, str):
        return False
    axis, spatial = input.row_layout.dim - 2, weight.ndim - 2
    if axis < 0:
        return axis == -2
    strides, pads = per_dim(fixed(stride), spatial), per_dim(fixed(padding), spatial)
    return (weight.shape[axis + 2], strides[axis], pads[axis]) == (1, 1, 0)


@rule(*named("conv1d", "conv2d", "conv3d"), of_many_kernels=True, order_free=_is_order_free)
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
    stride, padding, dilation = fixed(stride), fixed(padding), fixed(dilation)
    call = _plan(op_name(func), given(input, weight), stride, padding, dilation, groups)
    if call.far_side is not None:
        input = cast(PatchTensor, F.pad(input, call.far_side))
    windows, axis, strides, dilations = call.windows, call.plan.axis, call.strides, call.dilations

    def conv(rows: Tensor, start: int, lo: int, hi: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        pads = paddings(windows, axis, start, lo)
        if call.by_size:
            return convolve(func, rows, weight, bias, strides, pads, dilations, groups)
        result: Tensor = func(rows, weight, bias, strides, pads, dilations, groups)
        return result

    return carry_out(call.plan, func, input, conv, weights=Weights(weight, bias))


class _Plan(NamedTuple):
    """``far_side``: what "same" with an even kernel adds behind, as ``F.pad`` takes it, in all dims but the rows.

    ``by_size``: torch takes another kernel for a small piece (convolution_kernel.py).
    """

    windows: tuple[WindowStencil, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    far_side: list[int] | None
    plan: WindowPlan
    by_size: bool


@lru_cache(maxsize=4096)
def _plan(op: str, given: Given, stride: Sizes, padding: Sizes | str, dilation: Sizes, groups: int) -> _Plan:
    weight, kernel, spatial = given.weight, given.weight[2:], len(given.weight) - 2
    axis, strides, dilations = given.layout.dim - 2, per_dim(stride, spatial), per_dim(dilation, spatial)
    before, after = _paddings(padding, kernel, dilations, strides)
    more = [0 if d == axis else stop - start for d, (start, stop) in enumerate(zip(before, after))]
    windows = tuple(
        WindowStencil(k, s, start, stop - extra, d)
        for k, s, start, stop, extra, d in zip(kernel, strides, before, after, more, dilations, strict=True)
    )
    far_side = None
    if any(more):
        far_side = [n for extra in reversed(more) for n in (0, extra)]
        sizes = [size + extra for size, extra in zip(given.shape[2:], more)]
        given = given._replace(shape=torch.Size([*given.shape[:2], *sizes]))
    fit = weight[1] * groups == given.shape[1] and weight[0] % groups == 0
    plan = plan_windows(op, given, windows, pads=True, channels=weight[0], fit=fit)
    by_size = fit and given.kind == "cpu" and given.dtype is torch.float32
    if by_size and not torch.compiler.is_compiling():
        by_size = may_gain(given.shape, weight, max(axis, 0), strides, before, dilations, groups)
    return _Plan(windows, strides, dilations, far_side, plan, by_size)


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
