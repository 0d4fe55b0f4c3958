"""Ranks that stand in a mesh: a group for each axis, over which a dim is sharded, and all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distpatch.comm.communicator import Communicator, Group, communicator
from distpatch.errors import LayoutError, RankError

Mesh: TypeAlias = "Group | Sequence[Group]"  # a DeviceMesh of several axes, or a group an axis
Dims: TypeAlias = "int | tuple[int, ...]"


def has_axes(dim: Dims) -> bool:
    """Whether several dims are sharded, each over an axis of its own."""
    return not isinstance(dim, int)


def dims_of(dim: object) -> Dims:
    """A dim, or several different ones; one in a tuple is itself. Raises ``ValueError`` for anything else."""
    if isinstance(dim, int):
        return dim
    if not isinstance(dim, (tuple, list)) or not dim or not all(isinstance(one, int) for one in dim):
        raise ValueError(f"dim is a number, or several of them, one an axis of the mesh; got {dim!r}")
    if len(set(dim)) < len(dim):
        raise ValueError(f"dim names a dim once for each axis of the mesh; got {dim!r}")
    return dim[0] if len(dim) == 1 else tuple(dim)


def axes_of(mesh: Mesh, dims: Sequence[int], device: torch.device | None = None) -> list[Communicator]:
    """The communicator of each axis, connected; every rank of the mesh calls it the first time.

    Raises ``LayoutError`` where there are not as many axes as dims, ``RankError`` for a rank that is no member.
    """
    if isinstance(mesh, DeviceMesh):
        if mesh.get_coordinate() is None:
            raise RankError(f"global rank {dist.get_rank()} is not a member of the mesh {mesh}")
        groups: list[Group] = [mesh.get_group(axis) for axis in range(mesh.ndim)]
    elif isinstance(mesh, (tuple, list)):
        groups = list(mesh)
    else:
        groups = [mesh]  # type: ignore[list-item]
    if len(groups) != len(dims):
        raise LayoutError(
            f"dims {tuple(dims)} are sharded over one axis of a mesh each; got {len(groups)} "
            f"{'axis' if len(groups) == 1 else 'axes'}: {mesh}"
        )
    return [communicator(group, device) for group in groups]
