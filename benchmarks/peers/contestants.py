"""How each system that can do (part of) the job runs the same network: one function a peer.

Each takes the network and what it needs to know, and returns a call from a full input to a full output. A peer
that does not support the network raises, here or at its first call; the benchmark shows what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Run = Callable[[Tensor], Tensor]
STACK_CHANNELS, STACK_LAYERS, STACK_GROUPS = 64, 4, 32


class Stack(nn.Sequential):
    """Convolution, GroupNorm and SiLU, four times, at one resolution."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(STACK_LAYERS):
            layers.append(nn.Conv2d(STACK_CHANNELS, STACK_CHANNELS, 3, padding=1))
            layers.append(nn.GroupNorm(STACK_GROUPS, STACK_CHANNELS))
            layers.append(nn.SiLU())
        super().__init__(*layers)
        self.eval().requires_grad_(False)


@dataclass
class Place:
    """Where a rank runs: its group (None for one process), its device, and the side of the picture, in pixels."""

    group: dist.ProcessGroup | None
    device: torch.device
    pixels: int


def plain(model: Any) -> Run:
    """The network's call: an autoencoder decodes."""
    return model if isinstance(model, Stack) else lambda latents: model.decode(latents).sample


def one_process(model: Any, place: Place) -> Run:
    return plain(model)


def distpatch(model: Any, place: Place) -> Run:
    import distpatch

    distpatch.convert_model(model, place.group)
    return plain(model)


def distvae(model: Any, place: Place) -> Run:
    """Its decoder adapter; for the stack, the layers that adapter is made of."""
    from distvae.modules.adapters.layers.conv_adapters import Conv2dAdapter
    from distvae.modules.adapters.layers.norm_adapters import GroupNormAdapter
    from distvae.modules.adapters.vae.decoder_adapters import DecoderAdapter
    from distvae.modules.patch_utils import DePatchify, Patchify
    from distvae.utils import parallel_context

    if not isinstance(model, Stack):
        model.decoder = DecoderAdapter(model.decoder, place.group)
        return plain(model)
    context = parallel_context(place.group, -2, ndim=4)
    adapters = {nn.Conv2d: Conv2dAdapter, nn.GroupNorm: GroupNormAdapter}
    layers = [
        adapters[type(layer)](layer, parallel_context=context) if type(layer) in adapters else layer for layer in model
    ]
    return nn.Sequential(Patchify(parallel_context=context), *layers, DePatchify(parallel_context=context)).eval()


def dtensor(model: Any, place: Place) -> Run:
    """torch's own: weights replicated, the input sharded by rows."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    assert place.group is not None
    mesh = DeviceMesh.from_group(place.group, place.device.type)
    run = plain(distribute_module(model, mesh))
    return lambda x: run(distribute_tensor(x, mesh, [Shard(2)])).full_tensor()  # type: ignore[attr-defined]


def shard_tensor(model: Any, place: Place) -> Run:
    """PhysicsNeMo's ShardTensor, as DTensor.

    Its handlers, which it registers itself only where there is a GPU, are registered. Its manager is told of the group
    that is open: its own set-up on a CPU gives ``init_process_group`` a device that torch 2.13 refuses.
    """
    from physicsnemo.distributed import DistributedManager
    from physicsnemo.domain_parallel import register_custom_ops, scatter_tensor
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module

    assert place.group is not None
    rank, ranks = place.group.rank(), place.group.size()
    DistributedManager._shared_state["_is_initialized"] = True
    manager = DistributedManager()
    manager._rank = manager._local_rank = rank
    manager._world_size, manager._distributed, manager._device = ranks, True, place.device
    register_custom_ops()
    mesh = init_device_mesh(place.device.type, (ranks,), mesh_dim_names=("rows",))
    run = plain(distribute_module(model, mesh))

    def call(x: Tensor) -> Tensor:
        rows = scatter_tensor(x, 0, mesh, (Shard(2),), global_shape=x.shape, dtype=x.dtype)
        return run(rows).full_tensor()  # type: ignore[attr-defined]

    return call


def patch_conv(model: Any, place: Place) -> Run:
    """One process; convolutions below 2^30 input elements run as they are."""
    from patch_conv import convert_model

    return plain(convert_model(model, splits=4))


def tiling(model: Any, place: Place) -> Run:
    """diffusers' own, in one process: tiles of half the picture's side, blended where they overlap."""
    if isinstance(model, Stack):
        raise NotImplementedError("for diffusers' autoencoders only")
    model.enable_tiling()
    model.tile_sample_min_size = place.pixels // 2
    model.tile_latent_min_size = place.pixels // 16
    return plain(model)


RUNS: dict[str, Callable[[Any, Place], Run]] = {
    run.__name__: run for run in (one_process, distpatch, distvae, dtensor, shard_tensor, patch_conv, tiling)
}
