"""Classifier-free guidance on two halves of the ranks: one denoises with the prompt, the other without."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distpatch.comm.collectives import stack_ranks
from distpatch.comm.communicator import Communicator, communicator, group_of
from distpatch.errors import LayoutError
from distpatch.layout.rows import RowLayout
from distpatch.model.calls import conversion_of
from distpatch.model.convert import convert_model
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.tensor.region import Region
from distpatch.torch_utils import private
from distpatch.torch_utils.tree import map_tensors, tensors_in

M = TypeVar("M", bound=nn.Module)

AXES = ("guidance", "rows")


def guidance_mesh(group: dist.ProcessGroup | None = None) -> DeviceMesh:
    """A mesh ("guidance", "rows") of 2 × N/2 of a group's N ranks; all of them call it.

    Ranks 2r and 2r + 1 of the group hold the same rows, one in each half: what the halves denoised is then
    shared by neighbours, and the two split those rows between them for whatever runs on all ranks. Raises
    ``LayoutError`` for an odd number of ranks.
    """
    group = group or dist.group.WORLD
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) % 2:
        raise LayoutError(f"guidance_mesh: {len(ranks)} ranks cannot be split into two halves of equal size")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    served = {device.type for device in private.devices_of(group)}
    device_type = accelerator.type if accelerator is not None and accelerator.type in served else "cpu"
    mesh = torch.tensor(ranks).view(-1, 2).t()
    half, place = (mesh == dist.get_rank()).nonzero()[0].tolist()
    groups = [group_of(mesh[:, place].tolist()), group_of(mesh[half].tolist())]
    return DeviceMesh.from_group(groups, device_type, mesh, mesh_dim_names=AXES)


def split_guidance(model: M, mesh: DeviceMesh, **options: Any) -> M:
    """``convert_model`` over ``mesh["rows"]``, with the batch split over ``mesh["guidance"]``.

    Every argument as long as the batch (that of the first sharded one, along dim 0) is cut into two halves, of which
    this rank's half of the mesh computes its own; the results are joined again, on all ranks, by one all-gather
    between the two. ``options``: those of ``convert_model``. ``restore_model`` undoes it. Raises ``LayoutError``
    for a mesh without these axes, and in a call whose batch is odd.
    """
    check_mesh(mesh)
    halves = communicator(mesh[AXES[0]])
    convert_model(model, mesh[AXES[1]], **options)
    forward, conversion = model.forward, conversion_of(model)
    assert conversion is not None
    entrance = conversion.entrances["forward"]

    @functools.wraps(forward)
    def both(*args: Any, **kwargs: Any) -> Any:
        dims = entrance.dims(args, kwargs)
        batch = next((t.shape[0] for t in tensors_in((args, kwargs)) if dims.of(t) is not None), 0)
        if batch % 2:
            raise LayoutError(
                f"{type(model).__name__}: a batch of {batch} has no two halves; split_guidance is for calls with "
                "and without the prompt in one batch (guidance_scale > 1)"
            )
        if halves.broken:
            halves.connect()
        with halves.open_call(f"{type(model).__name__}.forward"):
            given = map_tensors(lambda t: _half(t, batch, halves), (args, kwargs))
            return map_tensors(lambda t: _join(t, halves), forward(*given[0], **given[1]))

    model.forward = both  # type: ignore[method-assign]
    return model


def check_mesh(mesh: DeviceMesh) -> None:
    if mesh.mesh_dim_names != AXES or mesh.size(0) != 2:
        raise LayoutError(f"guidance is split over a mesh {AXES} of 2 x N/2 ranks (guidance_mesh); got {mesh}")


def _half(tensor: Tensor, batch: int, halves: Communicator) -> Tensor:
    if not batch or tensor.ndim == 0 or tensor.shape[0] != batch:
        return tensor
    return tensor.chunk(2)[halves.rank]


def _join(tensor: Tensor, halves: Communicator) -> Tensor:
    local = tensor.local if isinstance(tensor, PatchTensor) else tensor
    joined = stack_ranks(local, halves.name, "guidance").flatten(0, 1)
    return PatchTensor(joined, tensor.row_layout, tensor.region) if isinstance(tensor, PatchTensor) else joined


def on_all_ranks(x: PatchTensor, mesh: DeviceMesh, everyone: Communicator) -> PatchTensor | None:
    """Rows that both halves hold, sharded over all ranks: each of two takes its part of them, nothing is sent.

    None where the ranks do not stand in the order of ``guidance_mesh``.
    """
    group = everyone.group
    if group is None or mesh.mesh.t().flatten().tolist() != dist.get_process_group_ranks(group):
        return None
    bounds = [0]
    for lo, hi in zip(x.row_layout.bounds, x.row_layout.bounds[1:]):
        bounds += [(lo + hi + 1) // 2, hi]
    layout = RowLayout(x.row_layout.dim, tuple(bounds))
    start, stop = layout.interval(everyone.rank)
    first = x.row_layout.interval(x.region.comm.rank)[0]
    return PatchTensor(x.local.narrow(x.row_layout.dim, start - first, stop - start), layout, Region(everyone))
