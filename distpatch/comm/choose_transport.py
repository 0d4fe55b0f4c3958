"""Which transport a group and a device have: ``between`` chooses, ``using`` puts another in its place (tests do)."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist

from distpatch.comm.point_to_point import PointToPoint
from distpatch.comm.staged import Staged
from distpatch.comm.transport import Transport
from distpatch.errors import RankError
from distpatch.torch_utils import private


def between(pg: dist.ProcessGroup, device: torch.device) -> Transport:
    """How tensors of this device travel in a group: gloo takes those of the CPU alone.

    Raises ``RankError`` where the group has no backend for them, and none for the CPU that they can go by.
    """
    if backend_name(pg, device) not in ("" if device.type == "cpu" else "gloo", ""):
        return PointToPoint(pg, device)
    if device.type != "cpu" and backend_name(pg, torch.device("cpu")):
        return Staged(PointToPoint(pg))
    served = ", ".join(map(str, private.devices_of(pg)))
    raise RankError(
        f"the group has no backend for tensors of {device} (it has {served}): move the model and its arguments to one "
        'of these, or make the group with a backend for both (dist.init_process_group("cpu:gloo,cuda:nccl"))'
    )


def backend_name(pg: dist.ProcessGroup, device: torch.device) -> str:
    """Such as "nccl", or nothing where the group has no backend for this kind of device."""
    try:
        backend: Any = private.backend_of(pg, torch.device(device.type))
    except RuntimeError:
        return ""
    while hasattr(backend, "wrapped_pg"):  # TORCH_DISTRIBUTED_DEBUG=DETAIL
        backend = backend.wrapped_pg
    return str(backend.name())


Factory = Callable[[dist.ProcessGroup, torch.device], Transport]
_factory: list[Factory] = [between]  # the last one counts
_told: weakref.WeakSet[Any] = weakref.WeakSet()  # communicators: what they have made is made anew


def factory() -> Factory:
    """What makes the transport of a group and a device."""
    return _factory[-1]


class _Communicator(Protocol):
    def forget_transports(self) -> None: ...


def tell(communicator: _Communicator) -> None:
    """Have it told whenever another factory counts."""
    _told.add(communicator)


@contextlib.contextmanager
def using(make: Factory) -> Iterator[None]:
    """All groups of this process, in all threads, move their tensors by what ``make`` returns for group and device.

    It is asked once for each group and device. A transport keeps no strong reference to the group.
    """
    _factory.append(make)
    _tell_all()
    try:
        yield
    finally:
        _factory.remove(make)
        _tell_all()


def _tell_all() -> None:
    for communicator in list(_told):
        communicator.forget_transports()
