"""Rows that are a view of a sharded tensor on one device, and a replicated copy here (rules/core/aliasing.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.tensor.rule_table import RULES
from distpatch.torch_utils import private

_new_wrapper = torch.Tensor._make_wrapper_subclass


def below_the_table(func: Any, args: Any) -> Any:
    """An operator that no rule was asked for: a detach, as which torch.compile sees ``x.data``, is asked of one now."""
    inside = private.functorch_transform()
    if func is torch.ops.aten.detach.default and inside is None:
        return type(args[0]).__torch_function__(torch.Tensor.detach, (), args)
    hidden = "" if inside is None else f" (inside torch.func's {inside.key().name}, which hides the tensor)"
    raise UnsupportedOpError(
        f"{func} reached a sharded tensor below the table of rules{hidden}, where its rows could be taken "
        "for the whole image. Gather it first (distpatch.gather), or register a rule for the "
        "torch function that calls it (distpatch.register_rule)."
    )


def refuse_forward_mode(op: str) -> None:
    raise UnsupportedOpError(
        f"{op} was called inside torch.autograd.forward_ad.dual_level, and forward-mode derivatives have no rules for "
        "what moves between ranks: use torch.autograd.grad, or torch.autograd.functional.jvp (by two backward passes)"
    )


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
        return below_the_table(func, args)

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
