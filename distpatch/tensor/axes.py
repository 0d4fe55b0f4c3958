"""Tensors that are sharded along several dims, each over one axis of a mesh of ranks.

The rows of such a ``PatchTensor`` are a ``PatchTensor`` themselves, over another axis. A rule computes with plain torch
on ``.local``, which then asks for rules of its own: so each rule runs once an axis, and knows of one alone. What is
sharded over inner axes alone is to a rule of an outer one what a plain tensor is to a single axis: the same on all its
ranks. Among the rule's arguments it is an ``InnerTensor``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.tree import map_tensors, tensors_in

_new_wrapper = torch.Tensor._make_wrapper_subclass


class InnerTensor(torch.Tensor):
    """What is sharded over inner axes alone, as an argument of a rule of an outer axis: it takes it for plain."""

    sharded: PatchTensor

    @staticmethod
    def __new__(cls, sharded: PatchTensor) -> InnerTensor:
        self: InnerTensor = _new_wrapper(cls, sharded.shape, dtype=sharded.dtype, device=sharded.device)
        self.sharded = sharded
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tensors_in((args, kwargs)) if isinstance(t, (PatchTensor, InnerTensor))]
        outermost = min(map(level_of, tensors))
        leads = [type(t) for t in tensors if isinstance(t, PatchTensor) and level_of(t) == outermost]
        if leads and any(isinstance(t, InnerTensor) and level_of(t) > outermost for t in tensors):
            lead = max(leads, key=lambda kind: len(kind.__mro__))  # torch asks subclasses first
            return lead.__torch_function__(func, types, args, kwargs)
        return func(*map_tensors(bare, args), **map_tensors(bare, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return PatchTensor.__torch_dispatch__(func, types, args, kwargs)


def bare(tensor: Any) -> Any:
    """The sharded tensor that an ``InnerTensor`` stands for; anything else as it is."""
    return tensor.sharded if isinstance(tensor, InnerTensor) else tensor


def level_of(tensor: PatchTensor | InnerTensor) -> int:
    level: int = (tensor.sharded if isinstance(tensor, InnerTensor) else tensor).region.level
    return level


def as_seen_by_outermost(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments as the rule of the outermost of their axes takes them; the same objects where nothing changes."""
    found = [t for t in tensors_in((args, kwargs)) if isinstance(t, (PatchTensor, InnerTensor))]
    levels = {level_of(t) for t in found}
    if len(levels) == 1 and not any(isinstance(t, InnerTensor) for t in found):
        return args, kwargs
    outermost = min(levels)

    def seen(tensor: Tensor) -> Tensor:
        if isinstance(tensor, InnerTensor) and level_of(tensor) == outermost:
            return tensor.sharded
        return InnerTensor(tensor) if isinstance(tensor, PatchTensor) and level_of(tensor) > outermost else tensor

    return map_tensors(seen, args), map_tensors(seen, kwargs)
