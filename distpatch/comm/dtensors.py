"""torch's own sharded tensors, which FSDP2 and tensor parallelism make of parameters."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distpatch.comm.communicator import Communicator


def is_dtensor(tensor: Tensor) -> TypeGuard[Any]:
    """Whether it is a ``DTensor``; without importing them."""
    return isinstance(getattr(tensor, "device_mesh", None), DeviceMesh)


def same_part(tensor: Any, comm: Communicator) -> Tensor | None:
    """What this rank holds of a DTensor, if every rank of the group holds the same: none other is on its mesh."""
    if comm.group is None:
        return None
    others = set(dist.get_process_group_ranks(comm.group)) - {dist.get_rank()}
    part: Tensor = tensor.to_local()
    return part if others.isdisjoint(tensor.device_mesh.mesh.flatten().tolist()) else None


def refusal(tensor: Any) -> str:
    """Why a DTensor cannot meet sharded rows, and what to do."""
    return (
        f"a DTensor of shape {tuple(tensor.shape)} and placements {tensor.placements} meets sharded rows. FSDP2 "
        "gathers a module's parameters for its forward alone: for another entry point call "
        'torch.distributed.fsdp.register_fsdp_forward_method(model, "decode") too. Parameters of tensor parallelism '
        "have no sharded rule: keep those modules out of the converted model, or gather them (full_tensor())."
    )
