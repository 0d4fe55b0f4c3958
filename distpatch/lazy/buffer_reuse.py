"""Buffer reuse: which storages have no other reference, and which deferred tensors still read them."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from distpatch.lazy.row_patches import memory_of
from distpatch.torch_utils.private import storage_uses


class DeferredRows(Protocol):
    """What is asked of a ``Recipe`` here (lazy/recipe.py)."""

    value: Tensor | None
    format: torch.memory_format
    owner: Callable[[], Any]

    @property
    def is_wanted(self) -> bool: ...
    def leaves(self) -> list[Any]: ...


class _Pending(threading.local):
    """``rows``: what is not computed yet of this thread's tensors, by weak references; none: nothing is deferred."""

    def __init__(self) -> None:
        self.rows: set[weakref.ref[DeferredRows]] = set()


pending = _Pending()


def nobody() -> None:
    return None


def deferred_rows() -> list[DeferredRows]:
    """The rows of tensors that are alive, and not computed yet."""
    alive = [rows() for rows in list(pending.rows)]
    return [rows for rows in alive if rows is not None and rows.value is None and rows.is_wanted]


def materialize_readers(rows: Tensor) -> None:
    """Compute what is to be made of these rows, before they are written to."""
    memory = memory_of(rows)
    for other in deferred_rows():
        if any(leaf.value.untyped_storage()._cdata == memory for leaf in other.leaves()):
            owner = other.owner()
            if owner is not None:
                owner.materialize()


def is_only_holder(leaf: DeferredRows) -> bool:
    """Whether nobody but this leaf holds its rows, nor any of their memory: by the counts of their references."""
    value = leaf.value
    assert value is not None
    storage = value.untyped_storage()
    if value.numel() * value.element_size() != storage.nbytes() or not value.is_contiguous(memory_format=leaf.format):
        return False
    if value.is_inference() and not torch.is_inference_mode_enabled():
        return False  # nobody may write to it
    del value, storage
    return _references(leaf) == _ALONE


def _references(leaf: Any) -> tuple[int, int]:
    value = leaf.value
    return sys.getrefcount(value), storage_uses(value.untyped_storage()._cdata)


class _Leaf:
    def __init__(self) -> None:
        self.value = torch.empty(1)


_ALONE = _references(_Leaf())  # as this Python and this torch count
