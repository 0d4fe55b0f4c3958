"""Process groups that their members make alone: the other ranks of the program know nothing of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from distpatch import torch_compat
from distpatch.errors import RankError


def known() -> int:
    """How many groups this process knows; torch names a group that its members make alone by this number."""
    return torch_compat.groups_known()


def by_members(
    members: Sequence[int],
    counts: Iterable[int],
    *,
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> dist.ProcessGroup:
    """A new group of these global ranks, in this order; each of them calls it, and nobody else.

    ``counts``: how many groups each member knows. Ranks that know different numbers would wait for each other
    under different names, so that each first makes as many groups of its own as it lacks. Raises ``RankError``
    under torchcomms, which has no such groups.
    """
    if getattr(c10d, "_use_torchcomms_enabled", bool)():
        raise RankError(
            "torchcomms (TORCH_DISTRIBUTED_USE_TORCHCOMMS) cannot make a group of some ranks by these ranks alone, "
            "which distpatch needs: start the program without it"
        )
    with _unbound():
        for _ in range(max(counts) - known()):
            _new([dist.get_rank()], backend="gloo", timeout=timeout)
        return _new(members, backend=backend, timeout=timeout)


def _new(members: Sequence[int], **options: Any) -> dist.ProcessGroup:
    return torch_compat.new_group(members, use_local_synchronization=True, group_desc="distpatch", **options)


@contextlib.contextmanager
def _unbound() -> Iterator[None]:
    """The default group's device hidden: from a group that is bound to one torch splits new ones off.

    A split (``ncclCommSplit``) is collective over the whole default group, and hangs where some ranks alone call it.
    """
    default: Any = c10d._get_default_group()
    bound: torch.device | None = default.bound_device_id
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long the group's ranks wait for each other."""
    backend = group._get_backend(torch.device(group._device_types[0]))
    timeout: timedelta = backend.options._timeout
    return timeout
