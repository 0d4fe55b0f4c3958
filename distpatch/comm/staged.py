"""Through the CPU's memory: for a device whose tensors the group's backend cannot take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distpatch.comm.transport import Batch, Layer, Works


class Staged(Layer):
    """Through the CPU's memory, for a device whose tensors ``inner`` cannot take."""

    def post(self, batch: Batch) -> Works:
        outgoing = [_on_host(message) for message in batch.outgoing]
        landing = [_room_on_host(message) for message in batch.landing]
        works = self.inner.post(replace(batch, outgoing=outgoing, landing=landing, device=torch.device("cpu")))
        return [*works, (_Back(batch.landing, landing), None)] if landing else works

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        host = _on_host(tensor)
        self.inner.all_reduce(host, op)
        tensor.copy_(host, non_blocking=True)

    def all_gather(self, tensor: Tensor, op: str) -> Tensor:
        return self.inner.all_gather(_on_host(tensor), op).to(tensor.device, copy=True)


@dataclass(frozen=True)
class _Back:
    """What has landed on the host, on its way to where it belongs."""

    to: Sequence[Tensor]
    landed: Sequence[Tensor]

    def wait(self) -> None:
        for place, message in zip(self.to, self.landed, strict=True):
            place.copy_(message, non_blocking=True)


def _room_on_host(like: Tensor) -> Tensor:
    """Memory of the CPU that a GPU copies to and from at full speed."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.device.type == "cuda")


def _on_host(tensor: Tensor) -> Tensor:
    return _room_on_host(tensor).copy_(tensor)  # blocks: what follows on the host reads it
