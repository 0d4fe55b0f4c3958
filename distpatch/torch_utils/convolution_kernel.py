"""Which kernel convolves a piece on a CPU: the one that a whole image would get, also where the piece is small."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import Parameter

from distpatch.torch_utils.private import conv_backend, has_onednn, onednn_convolution, onednn_enabled

# Of multiply-adds, and of bytes of input and output: see ``convolve``. Swept by ``python -m benchmarks.kernels``.
LEAST, LEAST_OF_VOLUMES = 2_000_000, 750_000
LEAST_OF_ONE, LEAST_CHANNELS, MOST_BYTES = 8_000_000, 32, 32 << 20
_PLAIN = (Tensor, Parameter)


def convolve(
    func: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``func`` (``F.conv1d``, ``conv2d`` or ``conv3d``) of a batch, by oneDNN where torch takes a slower kernel.

    torch chooses by sizes. In float32 on a CPU, a batch of one without groups has to have more than 20480 elements,
    of a volume without its columns, and kernels of one row and column more than one thread; else the windows are
    unfolded and multiplied (im2col), which for volumes takes up to 20 times as long. A whole image seldom is so small;
    a patch of it, or one rank's rows, often are, and a rank may have but one thread.

    oneDNN takes about 0.03 ms more to start, so that the smallest stay torch's: those of fewer than ``LEAST``
    multiply-adds, or ``LEAST_OF_VOLUMES`` where unfolding costs more, of volumes and dilated kernels. Where the kernel
    is a single element nothing is unfolded, and oneDNN gains by its product alone: it is called from ``LEAST_OF_ONE``
    on, where both sides have ``LEAST_CHANNELS``, and where memory (``MOST_BYTES``) is not what limits it. Half
    precision needs none of this: for it torch takes oneDNN whatever the size.

    The result stands in memory as oneDNN leaves it on one device (``channels_last`` of either operand is kept, of
    volumes too). Its backward pass is the one that torch chooses.
    """
    if not _may_choose(x, weight, bias) or not _gains(
        x.shape, weight.shape, tuple(stride), tuple(padding), tuple(dilation), groups, torch.get_num_threads()
    ):
        return func(x, weight, bias, stride, padding, dilation, groups)
    if x.ndim > 3:
        result: Tensor = onednn_convolution(x, weight, bias, padding, stride, dilation, groups)
        return result
    # As torch does, which has formats of images alone.
    x, weight = x.unsqueeze(2), weight.unsqueeze(2)
    result = onednn_convolution(x, weight, bias, [0, *padding], [1, *stride], [1, *dilation], groups)
    return result.squeeze(2)


def may_gain(
    shape: Sequence[int],
    kernel: Sequence[int],
    axis: int,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> bool:
    """Whether ``convolve`` may choose for some rows, of the spatial dim ``axis``: whether torch asks for their number.

    Where it does not for the fewest that a kernel reads, it does for no larger piece. Of kernels of one element it
    asks for threads too, of which there may be others at each call.
    """
    if not has_onednn or math.prod(kernel[2:]) == 1:
        return has_onednn
    fewest, pads = list(shape), list(padding)
    span = dilation[axis] * (kernel[2 + axis] - 1) + 1
    fewest[2 + axis], pads[axis] = 1, span  # beyond the edge of an image all but one may be padding
    return conv_backend(fewest, kernel, stride, pads, dilation, groups).startswith("Slow")


def _may_choose(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operands are such that torch would ask for their sizes, and nothing is wrong with them."""
    return (
        x.dtype is weight.dtype is torch.float32
        and type(x) is Tensor
        and x.device.type == weight.device.type == "cpu"
        and type(weight) in _PLAIN
        and (bias is None or (type(bias) in _PLAIN and bias.dtype is x.dtype and bias.device == x.device))
        and (bias is None or bias.shape == weight.shape[:1])
        and onednn_enabled()
        and not torch.compiler.is_compiling()
    )


@lru_cache(maxsize=4096)
def _gains(
    shape: torch.Size,
    kernel: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    threads: int,
) -> bool:
    """Whether oneDNN is the faster one where torch would take another kernel; ``threads``: torch asks for them."""
    spatial = len(shape) - 2
    if (
        not has_onednn
        or not 1 <= spatial <= 3
        or {len(kernel) - 2, *map(len, (stride, padding, dilation))} != {spatial}
    ):
        return False
    if shape[1] != kernel[1] * groups or kernel[0] % groups or min(*stride, *dilation) < 1 or min(padding) < 0:
        return False
    dims = zip(shape[2:], kernel[2:], stride, padding, dilation)
    out = [shape[0], kernel[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in dims)]
    if min(*shape, *out, *kernel) < 1:
        return False
    work, moved = math.prod(out) * math.prod(kernel[1:]), 4 * (math.prod(shape) + math.prod(out))
    if math.prod(kernel[2:]) > 1:
        gains = work >= (LEAST_OF_VOLUMES if spatial == 3 or max(dilation) > 1 else LEAST)
    else:
        gains = work >= LEAST_OF_ONE and min(kernel[:2]) >= LEAST_CHANNELS and moved <= MOST_BYTES
    return gains and conv_backend(shape, kernel, stride, padding, dilation, groups).startswith("Slow")
