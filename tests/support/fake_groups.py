"""Process groups and devices that are asked for their names alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

CPU = torch.device("cpu")


def gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


class Group:
    """A process group of these backends, by kind of device."""

    def __init__(self, bound: torch.device | None = None, **backends: str) -> None:
        self.bound_device_id, self.backends = bound, backends
        self._device_types = [torch.device(kind) for kind in backends]

    def _get_backend(self, device: torch.device) -> Any:
        if device.type not in self.backends:
            raise RuntimeError(f"no backend for {device.type}")
        return SimpleNamespace(name=lambda: self.backends[device.type])


BOTH = {"cpu": "gloo", "cuda": "nccl"}
GLOO = {"cpu": "gloo", "cuda": "gloo"}
NCCL = {"cuda": "nccl"}
