"""Convolution over the sharded dim, any kernel, stride, padding and dilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import distpatch
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

X, W3, B = (2, 4, H, 5), (6, 4, 3, 3), (6,)
TALL = (13, 5)  # heights that a kernel without padding still fits


def conv(**options: object) -> Callable[..., torch.Tensor]:
    return lambda x, w, b=None: F.conv2d(x, w, b, **options)


def module(kind: type[nn.Module], **options: object) -> Callable[..., torch.Tensor]:
    """A module of 4 to 6 channels with the given weight, which may pad first (``padding_mode``)."""
    return lambda x, w: functional_call(kind(4, 6, w.shape[2:], bias=False, **options).double(), {"weight": w}, x)


CASES = {
    "3x3": case(conv(padding=1), X, W3, B, p2p=1),
    "no bias": case(conv(padding=1), X, W3, p2p=1),
    "no padding": case(conv(), X, W3, B, heights=TALL, p2p=1),
    "padding wider than the kernel": case(conv(padding=4), X, W3, B),
    "padding per dim": case(conv(padding=(0, 2)), X, W3, B, heights=TALL),
    "1x1": case(conv(), X, (6, 4, 1, 1), B, p2p=0),
    "1x1 stride 2": case(conv(stride=2), X, (6, 4, 1, 1), B),
    "1x1 with padding": case(conv(padding=1), X, (6, 4, 1, 1), B),
    "1x3": case(conv(padding=(0, 1)), X, (6, 4, 1, 3), B, p2p=0),
    "5x3": case(conv(padding=(2, 1)), X, (6, 4, 5, 3), B, p2p=1),
    "7x7": case(conv(padding=3), X, (6, 4, 7, 7), B, p2p=1),
    "2x2": case(conv(), X, (6, 4, 2, 2), B, heights=TALL),
    "2x2 padding 1": case(conv(padding=1), X, (6, 4, 2, 2), B),
    "4x4 stride 2": case(conv(stride=2, padding=1), X, (6, 4, 4, 4), B, heights=(8, 3, 2)),
    "4x4 stride 4": case(conv(stride=4), (2, 4, H, 8), (6, 4, 4, 4), B, heights=(16, 9, 5)),
    "stride 2": case(conv(stride=2, padding=1), X, W3, B, p2p=1),
    "stride 2 no padding": case(conv(stride=2), X, W3, B, heights=TALL),
    "stride 3": case(conv(stride=3, padding=1), X, W3, B),
    "stride wider than the kernel": case(conv(stride=(3, 1)), X, (6, 4, 2, 2), B, heights=TALL),
    "stride per dim": case(conv(stride=(1, 2), padding=1), X, W3, B),
    "dilation 2": case(conv(padding=2, dilation=2), X, W3, B),
    "dilation wider than a shard": case(conv(padding=(5, 1), dilation=(5, 1)), X, W3, B),
    "dilation and stride": case(conv(padding=3, dilation=3, stride=2), X, W3, B),
    "groups": case(conv(padding=1, groups=2), X, (6, 2, 3, 3), B),
    "depthwise": case(conv(padding=1, groups=4), X, (4, 1, 3, 3)),
    "same": case(conv(padding="same"), X, W3, B),
    "same, even kernel": case(conv(padding="same"), X, (6, 4, 4, 2), B),
    "same, dilation": case(conv(padding="same", dilation=(3, 2)), X, (6, 4, 2, 3), B),
    "valid": case(conv(padding="valid"), X, W3, B, heights=TALL),
    "unbatched": case(conv(padding=1), (4, H, 5), W3, B),
    "width": case(conv(padding=1), (2, 4, 5, H), W3, B, dim=-1, p2p=1),
    "width, stride 2": case(conv(stride=2, padding=1), (2, 4, 5, H), W3, B, dim=-1),
    "batch": case(conv(padding=1), (H, 4, 5, 5), W3, B, dim=0, p2p=0),
    "channels": case(conv(padding=1), (2, H, 5, 5), (6, 4, 3, 3), heights=(4,), dim=1),
    "channels_last": case(conv(padding=1), X, W3, B, channels_last=True, p2p=1),
    "channels_last stride 2": case(conv(padding=1, stride=2), X, W3, B, channels_last=True),
    "1d": case(lambda x, w: F.conv1d(x, w, padding=1), (2, 4, H), (6, 4, 3), dim=-1),
    "1d stride 2": case(lambda x, w: F.conv1d(x, w, None, 2, 1), (2, 4, H), (6, 4, 4), dim=-1, heights=(8, 7, 2)),
    "3d height": case(lambda x, w: F.conv3d(x, w, padding=1), (1, 2, 3, H, 4), (3, 2, 3, 3, 3)),
    "3d width": case(lambda x, w: F.conv3d(x, w, None, 1, (0, 1, 2)), (1, 2, 3, 4, H), (3, 2, 3, 3, 3), dim=-1),
    "3d time": case(lambda x, w: F.conv3d(x, w, padding=1), (1, 2, H, 4, 4), (3, 2, 3, 3, 3), dim=2),
    "reflect": case(module(nn.Conv2d, padding=1, padding_mode="reflect"), X, W3, heights=(7, 2)),
    "replicate": case(module(nn.Conv2d, padding=(2, 1), padding_mode="replicate", stride=2), X, W3),
    "circular": case(module(nn.Conv2d, padding=1, padding_mode="circular"), X, W3),
    "circular, same": case(module(nn.Conv2d, padding="same", padding_mode="circular"), X, (6, 4, 4, 3), heights=(7, 2)),
    "reflect, same, dilation": case(
        module(nn.Conv2d, padding="same", padding_mode="reflect", dilation=2), X, W3, heights=(7, 3)
    ),
    "1d circular": case(
        module(nn.Conv1d, padding=2, padding_mode="circular"), (2, 4, H), (6, 4, 5), dim=-1, heights=(7, 2)
    ),
    "1d same, even kernel": case(module(nn.Conv1d, padding="same"), (2, 4, H), (6, 4, 4), dim=-1),
    "1d unbatched": case(module(nn.Conv1d, padding=1), (4, H), (6, 4, 3), dim=-1),
    "3d replicate": case(module(nn.Conv3d, padding=1, padding_mode="replicate"), (1, 4, 2, H, 3), (6, 4, 3, 3, 3)),
    "3d circular, time": case(
        module(nn.Conv3d, padding=1, padding_mode="circular"), (1, 4, H, 2, 3), (6, 4, 3, 3, 3), dim=2
    ),
    "3d same, width": case(module(nn.Conv3d, padding="same"), (1, 4, 2, 3, H), (6, 4, 2, 3, 4), dim=-1),
    "3d unbatched": case(module(nn.Conv3d, padding=1), (4, 2, H, 3), (6, 4, 3, 3, 3)),
    "3d valid, dilation": case(
        module(nn.Conv3d, padding="valid", dilation=(1, 2, 1)), (1, 4, 2, H, 3), (6, 4, 2, 3, 2), heights=(9, 5)
    ),
    "two in a row": case(lambda x, a, b: F.conv2d(F.conv2d(x, a, padding=1), b, padding=1), X, W3, (4, 6, 3, 3)),
    "down and up again": case(
        lambda x, a: F.interpolate(F.conv2d(x, a, stride=2, padding=1), scale_factor=2.0), X, (4, 4, 3, 3)
    ),
    "pad, then none": case(lambda x, w: F.conv2d(F.pad(x, (0, 1, 0, 1)), w, stride=2), X, W3, heights=(8, 3, 2)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_convolution(case: Callable[[], None]) -> None:
    case()


class Operators(TorchDispatchMode):
    """Notes the operators of this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last_3d])
def test_thin_pieces_are_convolved_as_the_whole(format: torch.memory_format) -> None:
    """By oneDNN: torch itself would unfold the windows of a rank's few rows, and leave them in another format."""
    x = random_tensor((1, 16, 40, 34, 32), dtype=torch.float32).contiguous(memory_format=format)
    weight = random_tensor((16, 16, 3, 3, 3), seed=1, dtype=torch.float32)
    right = F.conv3d(x.double(), weight.double(), padding=1)

    def body(rank: int) -> tuple[Tensor, list[str], bool]:
        rows = distpatch.shard(x, dist.group.WORLD)
        with torch.no_grad(), Operators() as seen:
            made = F.conv3d(rows, weight, padding=1)
            local = made.local
        return distpatch.gather(made), seen.names, local.is_contiguous(memory_format=format)

    for got, names, is_format in run_ranks(3, body):
        assert (got - right).abs().max() <= 1e-5 * right.abs().max()
        assert is_format
        assert "aten::mkldnn_convolution" in names
        assert "aten::convolution" not in names
