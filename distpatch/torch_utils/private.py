"""The names of torch that are private, or that differ between its releases (2.11 to 2.14)."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch._library.effects import EffectType
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d as c10d

RELEASE = tuple(int(number) for number in torch.__version__.split(".")[:2])

storage_uses = torch._C._storage_Use_Count  # type: ignore[attr-defined]

KEEPS_INPUTS = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)  # the Function of checkpoint, up to 2.12


class FakeMode(FakeTensorMode):
    """Tensors without data, of devices that this machine has.

    They need no stand-in for a missing GPU, which torch 2.11 keeps in the memory of the thread that asked for it: after
    that thread has ended, the next use is a segmentation fault.
    """

    avoid_device_init = False  # type: ignore[assignment]


def all_gather(everyone: Tensor, own: Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill ``everyone`` with the contiguous tensors ``own`` of all ranks, one behind the other."""
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before 2.13
    gather(everyone, own, group=group)


def is_open(group: dist.ProcessGroup) -> bool:
    """Whether this process has not destroyed the group."""
    return group in c10d._world.pg_map


def forget_batch(group: dist.ProcessGroup) -> None:
    """Drop the messages of a batch that was begun and not ended."""
    c10d._world.pg_coalesce_state.pop(group, None)


def group_named(name: str) -> dist.ProcessGroup:
    """The open group of this name."""
    return torch._C._distributed_c10d._resolve_process_group(c10d.GroupName(name))


def keep_in_order(operator: Any) -> None:
    """Have every compiled graph keep all calls of a custom operator, in one order with those of others."""
    operator.register_effect(EffectType.ORDERED)


@functools.cache
def inlined(func: Any) -> Any:
    """The Python body of one of torch's own functions, without its ``has_torch_function`` check.

    So the functions that it calls are dispatched, each by its own rule.
    """
    asks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    namespace = {**func.__globals__, **dict.fromkeys(asks, lambda *_: False)}
    steps = types.FunctionType(func.__code__, namespace, func.__name__, func.__defaults__)
    steps.__kwdefaults__ = func.__kwdefaults__
    return steps


def is_compiling() -> bool:
    """Whether torch.compile asks, for a graph or for its guards, in this thread."""
    return torch._guards.TracingContext.try_get() is not None or torch._guards.CompileContext.try_get() is not None


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return torch._C._current_graph_task_id() >= 0
