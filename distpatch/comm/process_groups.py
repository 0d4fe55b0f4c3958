"""Process groups that their members make alone: the other ranks of the program know nothing of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distpatch.comm import io_threads
from distpatch.comm.rendezvous import Rendezvous
from distpatch.errors import RankError
from distpatch.torch_utils import private

CLEAN_UP_ONLY = "2"  # of torch's ErrorHandlingMode
UNUSED_TAG = 0x64697374  # of messages that nobody sends


def by_members(
    members: Sequence[int], name: str, *, timeout: timedelta, backend: str | None = None
) -> dist.ProcessGroup:
    """A new group of these global ranks, in this order; exactly these ranks call it.

    ``name``: the same on all members, and new; ``backend``: by default that of the default group. Raises
    ``RankError`` under torchcomms, which has no such groups.

    ``dist.new_group(use_local_synchronization=True)`` is not used: it chooses the name by how many groups a
    process has made, of which ranks that differ in that wait for each other under different names, and from
    torch 2.14 it counts, so that the next group that all ranks make has different names.
    """
    if private.uses_torchcomms():
        raise RankError(
            "torchcomms (TORCH_DISTRIBUTED_USE_TORCHCOMMS) cannot make a group of some ranks by these ranks alone, "
            "which distpatch needs: start the program without it"
        )
    default = private.default_group()
    nccl = "nccl" in (backend or str(dist.get_backend_config(default)))
    own_errors = _ended_by_abort() if nccl else contextlib.nullcontext()
    with _unbound(default), own_errors, io_threads.made_without_preemption():
        return private.new_group(default, list(members), name, backend, timeout)


@contextlib.contextmanager
def _ended_by_abort() -> Iterator[None]:
    """NCCL's groups made meanwhile are aborted where a transfer fails; by default torch would end the process."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = CLEAN_UP_ONLY
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def abort(group: dist.ProcessGroup) -> None:
    """End all that this rank has under way in a group, in whichever thread it is waited for; the others' waits fail.

    gloo has no call for that, but a receive that times out closes all connections of a rank (its ``UnboundBuffer``).
    NCCL ends the kernels that wait.
    """
    for kind in private.devices_of(group):
        backend = private.backend_of(group, kind)
        with contextlib.suppress(RuntimeError):  # it has failed already
            if backend.name() == "gloo":
                _close_connections(group)
            else:
                backend.abort()


def _close_connections(group: dist.ProcessGroup) -> None:
    for peer in range(group.size()):
        if peer != group.rank():
            with contextlib.suppress(RuntimeError):  # it has timed out, or is closed
                group.recv([torch.empty(1)], peer, UNUSED_TAG).wait(timedelta(milliseconds=1))


def close(group: dist.ProcessGroup) -> None:
    """Free a group that this rank has given up."""
    with contextlib.suppress(RuntimeError, ValueError):
        dist.destroy_process_group(group)


@contextlib.contextmanager
def _unbound(default: Any) -> Iterator[None]:
    """The default group's device hidden: from a group that is bound to one torch splits new ones off.

    A split (``ncclCommSplit``) is collective over the whole default group, and hangs where some ranks alone call it.
    """
    bound: torch.device | None = default.bound_device_id
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound


def rendezvous_of(group: dist.ProcessGroup) -> Rendezvous:
    """Where the group's ranks meet."""
    return Rendezvous(group.get_group_store(), group.rank(), group.size(), timeout_of(group))


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long the group's ranks wait for each other."""
    backend = private.backend_of(group, torch.device(private.devices_of(group)[0]))
    timeout: timedelta = backend.options._timeout
    return timeout
