"""Patch Conv for one layer: functions and a module that convolve a plain tensor in patches of rows.

A tensor is taken for the rows of a single rank, so that the rules for sharded rows do the work: the same
code, and the same exactness, as in a converted model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpatch.comm.communicator import ALONE
from distpatch.errors import LayoutError
from distpatch.model import exported as _exported
from distpatch.model.compile_ops import enter_compiled
from distpatch.rules.core.operands import per_dim
from distpatch.tensor import options
from distpatch.tensor.options import Options, check_splits
from distpatch.tensor.patch_tensor import PatchTensor, handed_back, shard_input
from distpatch.tensor.region import Region

__all__ = [
    "PatchConv2d",
    "patch_conv1d",
    "patch_conv2d",
    "patch_conv3d",
    "patch_conv_transpose1d",
    "patch_conv_transpose2d",
    "patch_conv_transpose3d",
]
assert _exported  # imported for the table of rules

Sizes = int | Sequence[int]
Splits = int | str


def patch_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    splits: Splits,
    sequential: bool = True,
    padding_mode: str = "zeros",
) -> Tensor:
    """``patch_conv2d`` for (B, C, L) or (C, L): the length is cut."""
    how = (stride, padding, dilation, groups)
    return _convolve(F.conv1d, 1, x, weight, bias, how, padding_mode, splits, sequential)


def patch_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    splits: Splits,
    sequential: bool = True,
    padding_mode: str = "zeros",
) -> Tensor:
    """``F.conv2d`` with the output's height cut into ``splits`` patches, for less memory at once.

    ``x``: (B, C, H, W) or (C, H, W), plain or a PatchTensor, whose rows on this rank are then cut (in a compiled
    graph, as its own region says). ``padding_mode``: "zeros", "reflect", "replicate" or "circular", as in
    ``nn.Conv2d``; the other arguments are those of ``F.conv2d``. ``splits``: how many patches (more than there
    are rows means one row each), or "auto" as in ``convert_model``. ``sequential``: one patch after the other,
    else all in one call, folded into the batch. Returns the values and gradients of the whole convolution, to
    rounding.

    Raises ``ValueError`` for ``splits`` below 1 or an unknown ``padding_mode``, ``LayoutError`` where the
    image is smaller than the kernel or has the wrong number of dims.
    """
    how = (stride, padding, dilation, groups)
    return _convolve(F.conv2d, 2, x, weight, bias, how, padding_mode, splits, sequential)


def patch_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    splits: Splits,
    sequential: bool = True,
    padding_mode: str = "zeros",
) -> Tensor:
    """``patch_conv2d`` for (B, C, T, H, W) or (C, T, H, W): the height is cut."""
    how = (stride, padding, dilation, groups)
    return _convolve(F.conv3d, 3, x, weight, bias, how, padding_mode, splits, sequential)


def patch_conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    splits: Splits,
) -> Tensor:
    """``patch_conv_transpose2d`` for (B, C, L) or (C, L): the length is cut."""
    how = (stride, padding, output_padding, groups, dilation)
    return _apply(F.conv_transpose1d, 1, x, (weight, bias, *how), splits, True)


def patch_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    splits: Splits,
) -> Tensor:
    """``F.conv_transpose2d`` with the output's height cut into ``splits`` patches, one after the other.

    Arguments, shapes and errors as of ``patch_conv2d`` and ``F.conv_transpose2d``.
    """
    how = (stride, padding, output_padding, groups, dilation)
    return _apply(F.conv_transpose2d, 2, x, (weight, bias, *how), splits, True)


def patch_conv_transpose3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    splits: Splits,
) -> Tensor:
    """``patch_conv_transpose2d`` for (B, C, T, H, W) or (C, T, H, W): the height is cut."""
    how = (stride, padding, output_padding, groups, dilation)
    return _apply(F.conv_transpose3d, 3, x, (weight, bias, *how), splits, True)


class PatchConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` that computes its output in ``splits`` patches of rows; see ``patch_conv2d``.

    >>> conv = PatchConv2d(splits=4, conv2d=conv)  # of a layer that exists: shares its parameters and hooks
    >>> conv = PatchConv2d(4, True, None, 128, 128, 3, padding=1)  # else the arguments of nn.Conv2d

    Class, attributes and state dict are those of ``nn.Conv2d``. Raises ``ValueError`` for ``splits`` below
    1, ``TypeError`` for a ``conv2d`` whose forward pass is its own, or whose weight is computed
    (parametrizations, weight norm): its rows cannot be convolved without it.
    """

    splits: Splits
    sequential: bool

    def __init__(
        self,
        splits: Splits = 4,
        sequential: bool = True,
        conv2d: nn.Conv2d | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        check_splits(splits)
        if conv2d is None:
            super().__init__(*args, **kwargs)
        else:
            _check_plain(conv2d, args, kwargs)
            self.__dict__.update(conv2d.__dict__)
            for name in ("_parameters", "_buffers", "_modules"):  # the tensors are shared, not what holds them
                self.__dict__[name] = dict(conv2d.__dict__[name])
        self.splits, self.sequential = splits, sequential

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = _as_rows(input, 2, self.splits, self.sequential, "PatchConv2d")
        return _back(super()._conv_forward(rows, weight, bias), input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, splits={self.splits}, sequential={self.sequential}"


def _convolve(
    func: Callable[..., Any],
    spatial: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    how: tuple[Any, ...],
    padding_mode: str,
    splits: Splits,
    sequential: bool,
) -> Tensor:
    """A convolution whose padding is made first where it is not of zeros, as ``nn.Conv2d`` does."""
    modes = ("zeros", "reflect", "replicate", "circular")
    if padding_mode not in modes:
        raise ValueError(f"padding_mode is one of {modes}; got {padding_mode!r}")
    stride, padding, dilation, groups = how
    rows = _as_rows(x, spatial, splits, sequential, func.__name__)
    if padding_mode != "zeros":
        kernel, dilations = weight.shape[2:], per_dim(dilation, spatial)
        rows = F.pad(rows, _edges(padding, kernel, dilations), mode=padding_mode)
        padding = 0
    return _back(func(rows, weight, bias, stride, padding, dilation, groups), x)


def _apply(
    func: Callable[..., Any], spatial: int, x: Tensor, args: tuple[Any, ...], splits: Splits, sequential: bool
) -> Tensor:
    return _back(func(_as_rows(x, spatial, splits, sequential, func.__name__), *args), x)


def _edges(padding: Sizes | str, kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """``F.pad``'s numbers, last dim first; of "same" the odd one stands behind, as ``nn.Conv2d`` has it."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        return [n for total in reversed(totals) for n in (total // 2, total - total // 2)]
    return [pad for pad in reversed(per_dim(padding, len(kernel))) for _ in range(2)]


def _as_rows(x: Tensor, spatial: int, splits: Splits, sequential: bool, op: str) -> Tensor:
    """The tensor as rows of this device alone; rows of a group's rank with these splits."""
    check_splits(splits)
    compiling = torch.compiler.is_dynamo_compiling()
    if isinstance(x, PatchTensor):
        if compiling:
            return x
        region = x.region
        how = replace(region.options, splits=splits, sequential=sequential)
        return shard_input(x, 0, replace(region, options=how))
    if x.ndim not in (spatial + 1, spatial + 2):
        raise LayoutError(
            f"{op} in patches takes {spatial + 2} dims (B, C, ...), or {spatial + 1} without a batch; got a tensor of "
            f"shape {tuple(x.shape)}"
        )
    dim = x.ndim - min(spatial, 2)
    if compiling:
        return enter_compiled(x, dim, ALONE.name, Options(splits, sequential))
    return shard_input(x, dim, Region(ALONE, replace(options.DEFAULT, splits=splits, sequential=sequential)))


def _back(result: Tensor, x: Tensor) -> Tensor:
    """What came of the rows, as the tensor that was given: plain, or of its own region."""
    compiling = torch.compiler.is_dynamo_compiling()
    if isinstance(x, PatchTensor):
        return result if compiling else shard_input(result, 0, x.region)
    if compiling:
        gathered: Tensor = torch.ops.distpatch.gather(result, "patch_conv")
        return gathered
    return handed_back(result)


def _check_plain(conv2d: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if args or kwargs:
        raise TypeError("PatchConv2d takes a conv2d, or the arguments of nn.Conv2d, not both")
    if not isinstance(conv2d, nn.Conv2d):
        raise TypeError(f"PatchConv2d(conv2d=...) takes an nn.Conv2d, got {type(conv2d).__name__}")
    own = next((name for name in ("forward", "_conv_forward") if _overrides(type(conv2d), name)), None)
    if own is not None and not isinstance(conv2d, PatchConv2d):
        raise TypeError(f"PatchConv2d: {type(conv2d).__name__} has a {own} of its own, which would be lost")
    if "weight" not in conv2d._parameters:
        raise TypeError(
            "PatchConv2d: the weight of this layer is computed (a parametrization or weight norm). Remove it first, "
            "or use distpatch.convert_model, which leaves the layer as it is."
        )


def _overrides(cls: type[nn.Module], name: str) -> bool:
    return getattr(cls, name) is not getattr(nn.Conv2d, name)
