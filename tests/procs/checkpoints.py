"""What processes save with ``torch.distributed.checkpoint``, and what others load of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distpatch
from tests.support.oracle import random_tensor

ROWS = 11
TENSORS = {
    "latents": (random_tensor((2, 3, ROWS, 4)), -2),
    "volume": (random_tensor((1, 2, ROWS, 3, 2)).float(), 2),
    "mask": (random_tensor((2, 3, ROWS, 4)) > 0, -2),
}


def tokens(x: Tensor) -> Tensor:
    """A layout of blocks: of each of the first two dims some rows on each rank."""
    return x.flatten(0, 2)


def state(fill: bool, uneven: bool) -> dict[str, Any]:
    bounds = [0, *(min(2 * rank + 3, ROWS) for rank in range(dist.get_world_size() - 1)), ROWS] if uneven else None
    group = dist.group.WORLD
    found = {
        name: distpatch.shard(x if fill else torch.zeros_like(x), group, dim=dim, bounds=bounds)
        for name, (x, dim) in TENSORS.items()
    }
    return {**found, "tokens": tokens(found["latents"].clone()), "step": 7 if fill else 0}


def save_tensors(rank: int, folder: str, uneven: bool) -> int:
    """How many bytes this rank wrote, at the most, in one tensor."""
    dcp.save(state(True, uneven), checkpoint_id=folder)
    return max(t.local.nbytes for t in state(True, uneven).values() if isinstance(t, Tensor))


def load_tensors(rank: int, folder: str, uneven: bool) -> dict[str, Any]:
    loaded = state(False, uneven)
    dcp.load(loaded, checkpoint_id=folder)
    return {name: distpatch.gather(value) for name, value in loaded.items()}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 1)).double()


def train(rank: int, data: int, rows: int, steps: int, load: str = "", save: str = "") -> dict[str, Tensor]:
    """Some steps on a mesh of data x rows, from a checkpoint and to one; the weights after them.

    One process: a model that is not converted.
    """
    model: Any = net()
    if data * rows > 1:
        mesh = init_device_mesh("cpu", (data, rows), mesh_dim_names=("data", "rows"))
        distpatch.convert_model(model, mesh["rows"])
        fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if load:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=load)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    place = 0 if data == 1 else mesh["data"].get_local_rank()
    images = random_tensor((4, 3, 9, 6))[place * 4 // data : (place + 1) * 4 // data]
    for _ in range(steps):
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, moments = get_state_dict(model, optimizer)
    if save:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=save)
    return {name: getattr(t, "full_tensor", lambda t=t: t)().clone() for name, t in weights.items()}
