"""The names of torch that are private, or that differ between its releases (2.11 to 2.14); no other file has any."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch._C import DisableTorchFunction, DisableTorchFunctionSubclass, ScriptMethod, parse_schema
from torch._C._distributed_c10d import AllgatherOptions
from torch._guards import detect_fake_mode
from torch._library.effects import EffectType
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.distributed import distributed_c10d as c10d
from torch.nn.modules._functions import BackwardHookFunction, SyncBatchNorm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

__all__ = [
    "BackwardHookFunction",
    "DataDependentOutputException",
    "DisableTorchFunction",
    "DisableTorchFunctionSubclass",
    "DynamicOutputShapeException",
    "FakeCopyMode",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "OpOverload",
    "OpOverloadPacket",
    "ScriptMethod",
    "SyncBatchNorm",
    "TorchDispatchMode",
    "detect_fake_mode",
    "in_kernel_invocation_manager",
    "is_traceable_wrapper_subclass",
    "parse_schema",
    "tree_map",
]

_NOW = AllgatherOptions()
_NOW.asyncOp = False
ASKS_NOBODY = torch._C._disabled_torch_function_impl  # ``__torch_function__`` of a kind of tensor that has no rules
CONNECTS = timedelta(seconds=60)  # to a store, also where the machine is busy
RUN_BACKWARD = "_engine_run_backward"  # of torch.autograd: what backward() and grad() both call
RELEASE = tuple(int(number) for number in torch.__version__.split(".")[:2])

storage_uses = torch._C._storage_Use_Count  # type: ignore[attr-defined]
has_storage = torch._C._has_storage
foreach_copy = torch._foreach_copy_
weight_norm = torch._weight_norm
schemas_named = torch._C._jit_get_schemas_for_operator
no_torch_function = torch._C._disabled_torch_function_impl  # type: ignore[attr-defined]
no_torch_dispatch = torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]
no_modes = _disable_current_modes
count_dispatch_modes = torch._C._len_torch_dispatch_stack
forward_mode_level = functools.partial(getattr, forward_ad, "_current_level")  # from 0, where tensors may have tangents
in_functorch = torch._C._are_functorch_transforms_active
has_setup_context = torch.autograd.function._is_setup_context_defined  # type: ignore[attr-defined]

onednn_convolution: Any = torch.mkldnn_convolution
has_onednn = torch.backends.mkldnn.is_available()
onednn_enabled = torch._C._get_mkldnn_enabled

nn_builtins: Any = torch._C._nn
variable_functions: Any = torch._C._VariableFunctions

KEEPS_INPUTS = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)  # the Function of checkpoint, up to 2.12


class FakeMode(FakeTensorMode):
    """Tensors without data, of devices that this machine has.

    They need no stand-in for a missing GPU, which torch 2.11 keeps in the memory of the thread that asked for it: after
    that thread has ended, the next use is a segmentation fault.
    """

    avoid_device_init = False  # type: ignore[assignment]


def all_gather(everyone: Tensor, own: Tensor, group: Any) -> None:
    """Fill ``everyone`` with the flat tensors ``own`` of all ranks, one behind the other.

    As ``dist.all_gather_single``, whose checks take longer than the rest.
    """
    gather = getattr(group, "all_gather_single", None) or group._allgather_base  # the name before 2.13
    if (work := gather(everyone, own, _NOW)) is not None:
        work.wait()


def is_open(group: dist.ProcessGroup) -> bool:
    """Whether this process has not destroyed the group."""
    return group in c10d._world.pg_map


def default_group() -> dist.ProcessGroup:
    """The group of all ranks. Raises ``ValueError`` where it was not initialised."""
    return c10d._get_default_group()


def uses_torchcomms() -> bool:
    """Whether torchcomms has the place of the backends: it makes no group that some ranks alone make."""
    enabled: bool = getattr(c10d, "_use_torchcomms_enabled", bool)()
    return enabled


def new_group(
    default: dist.ProcessGroup, members: list[int], name: str, backend: str | None, timeout: timedelta
) -> dist.ProcessGroup:
    """A group of these global ranks, in this order, which they alone make; by default of the default's backend."""
    default_backend, store = c10d._world.pg_map[default]
    made: dist.ProcessGroup
    made, _ = c10d._new_process_group_helper(
        len(members),
        members.index(default.rank()),
        members,
        dist.Backend(backend or default_backend),
        store,
        c10d.GroupName(name),
        timeout=timeout,
        group_desc="distpatch",
    )
    c10d._world.pg_group_ranks[made] = {rank: place for place, rank in enumerate(members)}
    return made


def backend_of(group: dist.ProcessGroup, device: torch.device) -> Any:
    """What moves the group's tensors of a kind of device. Raises ``RuntimeError`` where nothing does."""
    return group._get_backend(device)


def devices_of(group: Any) -> list[torch.device]:
    """The kinds of device that the group has backends for."""
    return list(group._device_types)


def collects_batches(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the backend for this device sends the messages of a batch at once, when it is ended."""
    return type(group) is dist.ProcessGroup and bool(group._get_backend(device).supports_coalescing)


def begin_batch(group: dist.ProcessGroup, device: torch.device) -> None:
    """Collect messages, on a backend that collects them."""
    group._start_coalescing(device)


def end_batch(group: dist.ProcessGroup, device: torch.device) -> Any:
    """Send the messages of a batch that was begun, on a backend that collects them; returns what to wait for."""
    return group._end_coalescing(device)


def own_connection(store: Any) -> Any:
    """Another one to the same store: a wait at one makes all wait that use it.

    The store answers at once, or has ended: torch would try for as long as ranks wait for each other.
    """
    timeout = store.timeout
    store.set_timeout(min(timeout, CONNECTS))
    try:
        connection = store.clone()
    finally:
        store.set_timeout(timeout)
    connection.set_timeout(timeout)
    return connection


# Of an operator that has to run whenever its graph does: a CUDA graph would replay its kernels without its Python.
NEVER_REPLAYED = (torch.Tag.cudagraph_unsafe,)


def keep_in_order(library: torch.library.Library, name: str) -> None:
    """Have every compiled graph keep all calls of an operator of this library, in one order with those of others."""
    library._register_effectful_op(name, EffectType.ORDERED)


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


def fused_attention(*args: Any, **kwargs: Any) -> Any:
    """Which kernel ``F.scaled_dot_product_attention`` would choose."""
    return torch._fused_sdp_choice(*args, **kwargs)


def conv_backend(
    shape: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str:
    """The name of the kernel that a CPU convolves float32 of these sizes with, in as many threads as there are."""
    how = [*map(list, (stride, padding, dilation))]
    with unset_fake_temporarily():
        x, w = (torch.empty(1).expand(sizes) for sizes in (shape, weight))
        backend = torch._C._select_conv_backend(x, w, None, *how, False, [0] * len(stride), groups)  # type: ignore[call-arg]
    return str(backend).rpartition(".")[2]


def functorch_transform() -> Any:
    """The transform of torch.func that calls, or None."""
    return torch._C._functorch.peek_interpreter_stack()


def recompute_to_the_end() -> None:
    """Let a checkpoint around this call compute all of it again, and not stop in it once all that it wants is saved."""
    pack, _ = torch._C._autograd._top_saved_tensors_default_hooks(True) or (None, None)
    for cell in getattr(pack, "__closure__", None) or ():
        if isinstance(cell.cell_contents, torch.utils.checkpoint._CheckpointFrame):
            cell.cell_contents.early_stop = False


def is_compiling() -> bool:
    """Whether torch.compile asks, for a graph or for its guards, in this thread."""
    return torch._guards.TracingContext.try_get() is not None or torch._guards.CompileContext.try_get() is not None


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return torch._C._current_graph_task_id() >= 0


def wrapped_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor of another class is made of, such as a quantised weight's; of others, itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from wrapped_tensors(getattr(tensor, name))
