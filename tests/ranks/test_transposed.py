"""Transposed convolution over the sharded dim, any kernel, stride, padding, output padding and dilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from tests.support.oracle import TOLERANCE, H, assert_same, case, random_tensor

X, B = (2, 4, H, 5), (6,)


def up(**options: object) -> Callable[..., Tensor]:
    return lambda x, w, b=None: F.conv_transpose2d(x, w, b, **options)


def by_module(x: Tensor, w: Tensor) -> Tensor:
    module = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, bias=False).double()
    output_size = (2 * x.shape[-2], 10)
    arguments = {"weight": w}
    return torch.func.functional_call(module, arguments, (x,), {"output_size": output_size})


CASES = {
    "2x2 stride 2": case(up(stride=2), X, (4, 6, 2, 2), B, p2p=0),
    "4x4 stride 2": case(up(stride=2, padding=1), X, (4, 6, 4, 4), B, p2p=1),
    "3x3 stride 2": case(up(stride=2, padding=1), X, (4, 6, 3, 3), B, p2p=1),
    "3x3 stride 2, output padding": case(up(stride=2, padding=1, output_padding=1), X, (4, 6, 3, 3), B, p2p=1),
    "no bias": case(up(stride=2, padding=1), X, (4, 6, 4, 4)),
    "stride 1": case(up(padding=1), X, (4, 6, 3, 3), B, p2p=1),
    "no padding": case(up(), X, (4, 6, 3, 3), B),
    "more padding than the kernel": case(up(padding=3), X, (4, 6, 3, 3), B, heights=(7, 6)),
    "6x6 stride 4": case(up(stride=4, padding=1), X, (4, 6, 6, 6), B),
    "5x5 stride 3": case(up(stride=3, padding=2, output_padding=2), X, (4, 6, 5, 5), B),
    "stride wider than the kernel": case(up(stride=4), X, (4, 6, 2, 2), B),
    "rows nobody writes": case(up(stride=3, padding=1, output_padding=2), X, (4, 6, 1, 1), B, heights=(7, 2)),
    "1x1 stride 5": case(up(stride=5, padding=2, output_padding=4), X, (4, 6, 1, 1), B),
    "1x1": case(up(), X, (4, 6, 1, 1), B, p2p=0),
    "kernel and stride per dim": case(up(stride=(1, 2), padding=(2, 0)), X, (4, 6, 5, 2), B),
    "rows only": case(up(stride=(2, 1), padding=(1, 1)), X, (4, 6, 4, 3), B),
    "columns only": case(up(stride=(1, 2), padding=(0, 1)), X, (4, 6, 1, 4), B, p2p=0),
    "dilation": case(up(stride=2, padding=2, dilation=2), X, (4, 6, 3, 3), B, heights=(7, 2)),
    "dilation, output padding": case(up(padding=1, dilation=3, output_padding=2), X, (4, 6, 3, 2), B),
    "dilation and gaps": case(up(stride=3, dilation=2, output_padding=1), X, (4, 6, 2, 2), B),
    "wider than a shard": case(up(stride=2, padding=5), X, (4, 6, 13, 3), B),
    "groups": case(up(stride=2, padding=1, groups=2), X, (4, 3, 4, 4), B),
    "depthwise": case(up(stride=2, padding=1, groups=4), X, (4, 1, 4, 4)),
    "channels_last": case(up(stride=2, padding=1), X, (4, 6, 4, 4), B, channels_last=True),
    "module, output size": case(by_module, X, (4, 6, 3, 3)),
    "unbatched": case(up(stride=2, padding=1), (4, H, 5), (4, 6, 4, 4), B),
    "width": case(up(stride=2, padding=1), (2, 4, 5, H), (4, 6, 4, 4), B, dim=-1, p2p=1),
    "width, output padding": case(up(stride=3, padding=1, output_padding=1), (2, 4, 5, H), (4, 6, 3, 3), dim=-1),
    "batch": case(up(stride=2, padding=1), (H, 4, 3, 5), (4, 6, 4, 4), B, dim=0, p2p=0),
    "channels": case(up(), (2, H, 3, 5), (4, 6, 2, 2), heights=(4,), dim=1),
    "1d": case(lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1), (2, 4, H), (4, 6, 3), B, dim=-1),
    "1d unbatched": case(lambda x, w: F.conv_transpose1d(x, w, stride=4), (4, H), (4, 6, 3), dim=-1),
    "3d height": case(lambda x, w: F.conv_transpose3d(x, w, None, 2, 1), (1, 2, 3, H, 4), (2, 3, 4, 4, 4)),
    "3d width": case(
        lambda x, w: F.conv_transpose3d(x, w, None, 1, (0, 1, 2)), (1, 2, 2, 3, H), (2, 3, 1, 3, 5), dim=-1
    ),
    "3d time": case(
        lambda x, w: F.conv_transpose3d(x, w, None, (2, 1, 1), 1), (1, 2, H, 3, 4), (2, 3, 4, 3, 3), dim=2
    ),
    "down and up again": case(
        lambda x, w: F.conv_transpose2d(F.conv2d(x, w, stride=2, padding=1), w, stride=2, padding=1),
        X, (6, 4, 4, 4), heights=(8, 5, 2),
    ),
    "Haar wavelet": case(
        lambda x, w: F.conv_transpose2d(F.conv2d(x, w, stride=2, groups=4), w, stride=2, groups=4),
        (2, 4, H, 6), (8, 1, 2, 2), heights=(6, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_transposed(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("grad", (False, True))
def test_patches(grad: bool) -> None:
    """On one device, three patches of rows give what the whole gives."""
    module, x = nn.ConvTranspose2d(4, 6, 4, 2, 1).double(), random_tensor((2, 4, 7, 5))
    with torch.set_grad_enabled(grad):
        right = module(x)
        patched = distpatch.convert_model(module, splits=3)(x)
    assert_same(patched.detach(), right.detach(), TOLERANCE, "three patches")
