"""Rows that are a view of a sharded tensor on one device, and a replicated copy here (rules/core/aliasing.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.tensor.rule_table import RULES
from distpatch.torch_utils import private
from distpatch.torch_utils.tree import map_tensors

_new_wrapper = torch.Tensor._make_wrapper_subclass


class RowCopy(torch.Tensor):
    """Rows that are a view of a sharded tensor on one device, such as ``x[:, :, 0]``: replicated, as PatchCopy."""

    plain: Tensor
    origin: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return RULES.dispatcher.on_copies(func, args, kwargs or {})


class RowCopyInGraph(RowCopy):
    """One that a compiler traces, or has traced: it holds the rows, as fake tensors can be of no other class."""

    @staticmethod
    def __new__(cls, plain: Tensor, origin: Any) -> RowCopyInGraph:
        self: RowCopyInGraph = _new_wrapper(
            cls, plain.shape, strides=plain.stride(), dtype=plain.dtype, device=plain.device
        )
        self.plain, self.origin = plain, origin
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _OF_WRAPPER and private.is_compiling():  # torch.compile makes a fake tensor of it
            with private.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return RULES.dispatcher.on_copies(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What compilers call past the table of rules, such as a detach."""
        return func(*map_tensors(_without, args), **map_tensors(_without, kwargs or {}))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["plain"], self.origin.outside()

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, strides: Any) -> RowCopyInGraph:
        return RowCopyInGraph(inner["plain"], context)

    @classmethod
    def __metadata_guard__(cls, known: Any, given: Any) -> bool:
        return bool(known.shape == given.shape)

    def _stable_hash_for_caching(self) -> str:
        raise UnsupportedOpError("a copy of sharded rows is not cached beyond this process")


_OF_WRAPPER = frozenset(
    {
        torch.Tensor.untyped_storage,
        torch.Tensor.storage_offset,
        torch.Tensor._is_view,
        torch.Tensor._base.__get__,  # type: ignore[union-attr]
    }
)


def _without(tensor: Tensor) -> Tensor:
    return tensor.plain if isinstance(tensor, RowCopyInGraph) else tensor
