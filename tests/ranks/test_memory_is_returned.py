"""Freed memory goes back: nothing grows with the number of forwards, or of different shapes."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distpatch
from tests.support.threads import run_ranks

# FORWARDS=10000 in the environment: the long run, on one device and on two ranks.
FORWARDS, FORWARDS_OF_RANKS = (int(os.environ.get("FORWARDS", default)) for default in ("2000", "500"))
SHAPES = [(1, 3, height, width) for height in range(31, 51, 2) for width in (16, 24, 32, 40, 48)]  # 50
LIBC = ctypes.CDLL(None)
ROUNDS_TO_SETTLE = 4  # in which plans are cached, kernels made, and malloc's free lists filled
MOST_BYTES = 7 << 20  # the free lists of malloc, one a thread, settle late; 500 images are 15 MiB on two ranks


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size in /proc")


class Net(nn.Module):
    """A convolution, a norm, a resize and a residual: halos, statistics, plans of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.out = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 3, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.norm(self.into(x)))
        return x + self.out(nn.functional.interpolate(y, scale_factor=2.0))[..., ::2, ::2]


def resident() -> int:
    """Bytes of this process that are in memory and its own, less what other tests have left for malloc to give out."""
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
    _, pages, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (pages - shared) * resource.getpagesize()


def growth(model: nn.Module, forwards: int, meet: Callable[[], None]) -> int:
    """By how many resident bytes the process grew from the first rounds of all shapes to the last."""
    images = [torch.zeros(shape) for shape in SHAPES]

    def after(rounds: int) -> int:
        for _ in range(rounds):
            for image in images:
                model(image)
        meet()  # no rank of this process computes while one looks
        found = resident()
        meet()
        return found

    with torch.inference_mode():
        before = after(ROUNDS_TO_SETTLE)
        return after(forwards // len(SHAPES)) - before


def alone() -> None:
    """There is nobody to meet."""


def test_one_device() -> None:
    grown = growth(distpatch.convert_model(Net(), splits=3), FORWARDS, alone)
    assert grown < MOST_BYTES, f"{grown / 1024:.0f} KiB more after {FORWARDS} forwards"


def test_two_ranks() -> None:
    net, barrier = Net(), threading.Barrier(2)

    def body(rank: int) -> int:
        return growth(distpatch.convert_model(copy.deepcopy(net), dist.group.WORLD), FORWARDS_OF_RANKS, barrier.wait)

    grown = max(run_ranks(2, body, timeout=60))
    assert grown < MOST_BYTES, f"{grown / 1024:.0f} KiB more after {FORWARDS_OF_RANKS} forwards on each of 2 ranks"


def test_a_leak_is_seen() -> None:
    """One activation kept in each forward."""
    model, kept = Net(), []
    model.norm.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    assert growth(model, FORWARDS, alone) > MOST_BYTES
