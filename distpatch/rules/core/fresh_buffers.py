"""Plain tensors that rows are written to: made sharded ones, in place, where nothing else refers to their memory.

A model that asks torch for a tensor of its output's size, to fill it, gets a replicated one, which would have to
hold everybody's rows.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.collectives import narrow_rows, replicated_operand
from distpatch.layout.blocks import BlockLayout
from distpatch.layout.rows import RowLayout
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.private import storage_uses


def shard_like(target: Any, lead: PatchTensor, dim: int | None = None) -> bool:
    """Whether the plain tensor is now sharded as ``lead`` is, along ``dim`` (the lead's, counted from the back).

    It has to be as tall, and alone; a buffer of the model stays plain.
    """
    if not isinstance(target, Tensor) or isinstance(lead.row_layout, BlockLayout):
        return False
    dim = target.ndim + lead.row_layout.dim - lead.ndim if dim is None else dim
    if not 0 <= dim < target.ndim or target.shape[dim] != lead.row_layout.size:
        return False
    return shard_along(target, lead, lead.row_layout.with_dim(dim))


def shard_along(target: Tensor, lead: PatchTensor, layout: RowLayout) -> bool:
    """Whether the plain tensor is now sharded in this layout, in the lead's region."""
    if id(target) in lead.region.call.buffers or not _is_alone(target):
        return False
    rows = narrow_rows(replicated_operand(target, lead.comm.name), layout, lead.rank).clone()
    torch.utils.swap_tensors(target, PatchTensor(rows, layout, lead.region))
    return True


def _is_alone(x: Tensor) -> bool:
    """Whether the tensor is no view and no leaf, has no views, and shares its memory with nothing else."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or (x.requires_grad and x.is_leaf) or x._is_view():
        return False
    storage = x.untyped_storage()
    uses = storage_uses(storage._cdata)
    once = x._use_count() == 1  # type: ignore[attr-defined]
    fresh = once and uses <= 2 and storage.resizable() and not storage.is_shared()  # by the tensor, and by ``storage``
    return fresh and not weakref.getweakrefs(x)
