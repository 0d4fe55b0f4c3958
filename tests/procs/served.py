"""Nets that processes of their own import: nothing here may touch torch.distributed, as tests' ranks of threads do."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """With all that a call may see change: weights, a buffer, an attribute, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.last = nn.Conv2d(8, 3, 3, padding=1)
        self.register_buffer("offset", torch.zeros(3, 1, 1))
        self.scale = 1.0
        self.noisy = self.doubles_its_gain = False

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> dict[str, Any]:
        if self.doubles_its_gain and isinstance(gain, Tensor):
            gain.mul_(2)
        y = self.last(self.body(x)) * self.scale * gain + self.offset
        return {"y": y + torch.randn_like(y) if self.noisy else y, "mean": y.mean()}


class Deadly(nn.Module):
    """Ends the process of rank 1."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.avg_pool2d(x, 3, 1, 1).sum()


class Cores(nn.Module):
    """The cores that rank 0 may run on."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(sorted(os.sched_getaffinity(0)))
