"""What a run computes: operations by the torch function that asked for them, their FLOPs, bytes and time.

The same meter counts a real run (``trace(measure=True)``) and one on fake tensors (``plan``).
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from distpatch.profiling.live_memory import LivePeak, stored_tensors
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.private import in_backward

T = TypeVar("T")
aten = torch.ops.aten

NO_READ = {aten.copy_, aten.fill_, aten.zero_}  # they write to their first argument, and do not read it
NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "resize_", "set_", "is_same_size", "_local_scalar_dense")
BACKWARD = "backward"


class Kernel(NamedTuple):
    """One operation of torch on this rank.

    ``op``: the torch function that asked for it; ``name``: the operator that ran; ``flops`` as
    ``torch.utils.flop_counter`` counts them (matrix products, convolutions and attention; the rest has none);
    ``moved_bytes``: read and written; ``replicated``: computed from replicated or gathered tensors alone, on
    every rank in full.
    """

    op: str
    name: str
    dtype: torch.dtype
    flops: int
    moved_bytes: int
    replicated: bool

    @property
    def is_launched(self) -> bool:
        """Whether it takes a kernel: of tensors without elements, or without data, torch runs none."""
        return self.moved_bytes > 0


@dataclass
class OpCost:
    """What one torch function cost on this rank, all its calls together; ``seconds`` of computing, not of waiting.

    ``launches``: operators that ran, see ``launches_of``.
    """

    op: str
    calls: int = 0
    launches: int = 0
    flops: int = 0
    moved_bytes: int = 0
    seconds: float = 0.0
    replicated_flops: int = 0


Mark = Any  # a moment: seconds of the host's clock, or a CUDA event


def mark(device: torch.device) -> Mark:
    """This moment: of the host's clock, or on the device's current stream where that is CUDA's."""
    if device.type == "cuda" and torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    return time.perf_counter()


def seconds_between(start: Mark, stop: Mark) -> float:
    """Seconds from one mark to the next; waits until the device has reached them."""
    if isinstance(start, float) or isinstance(stop, float):
        return stop - start if isinstance(start, float) and isinstance(stop, float) else 0.0
    stop.synchronize()
    milliseconds: float = start.elapsed_time(stop)
    return milliseconds / 1e3


class _Running(threading.local):
    """``meters``: that count what this thread computes; ``times``: for how many pieces the present one stands."""

    meters: tuple[Meter, ...] = ()
    times = 1


running = _Running()


def representatives(items: Sequence[T], last_too: bool = False, late: Collection[T] = ()) -> Iterator[T]:
    """One item of each kind, weighted by how many it stands for; all are alike but the first and, unless ``last_too``,

    the last. So a plan runs patches (row_patches.py): fake tensors are asked for nothing but their sizes, and one patch
    tells what the others of its kind would cost. Those that are ``late`` come after the others.
    """
    chosen: tuple[int, ...] = (0, len(items) - 1) if last_too else (0, 1, len(items) - 1)
    if len(items) <= len(chosen):
        chosen = tuple(range(len(items)))
    outside, rest = running.times, len(items) - len(chosen)
    for index in sorted(chosen, key=lambda index: items[index] in late):
        running.times = outside * (rest + 1 if rest and index == chosen[1] else 1)
        try:
            yield items[index]
        finally:
            running.times = outside


def gathered() -> None:
    """The running function gathers its arguments: from now on its work counts as replicated on every rank."""
    for meter in running.meters:
        meter.replicated = True


def attributed_to(op: str, compute: Callable[..., T], *args: Any) -> T:
    """``compute(*args)``, its cost attributed to ``op``: the deferred function, which returned before its work ran."""
    meters = running.meters
    outside = [(meter.op, meter.replicated) for meter in meters]
    for meter in meters:
        meter.op, meter.replicated = op, False
    try:
        return compute(*args)
    finally:
        for meter, (outer, replicated) in zip(meters, outside):
            meter.op, meter.replicated = outer, replicated


class Meter(LivePeak):
    """Count what this thread computes while the context is open, and the peak of live tensors.

    ``kernels``: how often each operation ran; ``calls``: of each torch function. ``timed``: also measure the
    seconds of each operation.
    """

    def __init__(self, *counted: Tensor, timed: bool = False) -> None:
        super().__init__(*counted)
        self.kernels: Counter[Kernel] = Counter()
        self.calls: Counter[str] = Counter()
        self.op, self.replicated = "", False
        self._timed = timed
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._functions = _Functions(self)

    def __enter__(self) -> Meter:
        running.meters = (*running.meters, self)
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)
        running.meters = tuple(meter for meter in running.meters if meter is not self)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each torch function computed."""
        for op, start, stop in self._spans:
            self._seconds[op] += seconds_between(start, stop)
        self._spans.clear()
        return self._seconds

    @property
    def launches(self) -> int:
        return launches_of(self.kernels)

    def costs(self) -> dict[str, OpCost]:
        """By torch function, those that computed something."""
        costs = costs_of(self.kernels, self.calls)
        for op, seconds in self.seconds.items():
            if op in costs:
                costs[op].seconds += seconds
        return costs

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _computes(func):
            return func(*args, **kwargs)
        op = self.op or (BACKWARD if in_backward() else func._overloadpacket.__name__)
        inputs = list(stored_tensors((args, kwargs)))
        device = inputs[0].device if inputs else torch.device("cpu")
        start = mark(device) if self._timed else 0.0
        result = func(*args, **kwargs)
        if self._timed:
            stop = mark(device)
            if isinstance(stop, float):
                self._seconds[op] += seconds_between(start, stop)
            else:
                self._spans.append((op, start, stop))
        kernel = self._kernel(op, func, args, kwargs, inputs, result)
        self.kernels[kernel] += running.times
        return result

    def _kernel(self, op: str, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], result: Any) -> Kernel:
        packet = func._overloadpacket
        outputs = list(stored_tensors(result))
        count = FLOPS.get(packet)
        flops = 0 if count is None else int(count(*args, **kwargs, out_val=result))
        read = inputs[1:] if packet in NO_READ else [t for t in inputs if t is not kwargs.get("out")]
        moved = sum(_bytes(t) for t in read) + sum(_bytes(t) for t in outputs)
        dtype = next((t.dtype for t in (*outputs, *inputs)), torch.float32)
        return Kernel(op, str(packet), dtype, flops, moved, self.replicated)


class _Functions(TorchFunctionMode):
    """Says which torch function is called: the outermost, as the model's code has it."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        meter = self.meter
        if meter.op:
            return func(*args, **(kwargs or {}))
        meter.op, meter.replicated = op_name(func), not any(map(_is_sharded, types))
        meter.calls[meter.op] += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            meter.op, meter.replicated = "", False


def costs_of(kernels: Counter[Kernel], calls: Counter[str]) -> dict[str, OpCost]:
    """Operations summed by the torch function that asked for them; those that move bytes."""
    costs: dict[str, OpCost] = {}
    for kernel, times in kernels.items():
        cost = costs.setdefault(kernel.op, OpCost(kernel.op, calls[kernel.op]))
        cost.launches += times * kernel.is_launched
        cost.flops += times * kernel.flops
        cost.moved_bytes += times * kernel.moved_bytes
        cost.replicated_flops += times * kernel.flops * kernel.replicated
    return costs


def launches_of(kernels: Counter[Kernel]) -> int:
    """Kernels launched: operators of torch that compute or copy, one each.

    Not views, memory without values, what has no elements, and the messages of exchanges, which are packed and
    unpacked inside them. A few operators launch more than one kernel (a convolution that transposes its input).
    """
    return sum(times for kernel, times in kernels.items() if kernel.is_launched)


@lru_cache(maxsize=1024)
def _is_sharded(kind: type) -> bool:
    return any(base.__name__ == "PatchTensor" for base in kind.__mro__)


@lru_cache(maxsize=4096)
def _computes(func: Any) -> bool:
    """Whether an operator computes or copies: not a view, not memory without values, not a transfer (a record)."""
    if func.namespace in {"distpatch", "prim"}:
        return False
    returned = [value.alias_info for value in func._schema.returns]
    if returned and all(info is not None and not info.is_write for info in returned):
        return False
    return not func._overloadpacket.__name__.startswith(NO_KERNEL)


def _bytes(tensor: Tensor) -> int:
    """What an operation reads or writes of a tensor: of one that is expanded, what is there."""
    return int(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


def _onednn_flops(x: Tensor, weight: Tensor, *args: Any, out_val: Tensor) -> int:
    return int(conv_flop_count(list(x.shape), list(weight.shape), list(out_val.shape)))


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, _of_heads(key, query), _of_heads(value, query)))


def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, _of_heads(key, query), _of_heads(value, query)))


def _of_heads(t: Tensor, query: Tensor) -> tuple[int, ...]:
    """The shape of keys or values, repeated for grouped queries."""
    return (t.shape[0], query.shape[1], *t.shape[2:])


# torch.utils.flop_counter leaves out the CPU's own attention and convolution; up to 2.12 it refuses grouped queries.
_KERNELS = ("efficient_attention", "flash_attention", "cudnn_attention")
FLOPS = {
    **flop_registry,
    aten.mkldnn_convolution: _onednn_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    **{getattr(aten, f"_scaled_dot_product_{kernel}"): _attention_flops for kernel in _KERNELS},
    **{getattr(aten, f"_scaled_dot_product_{kernel}_backward"): _attention_backward_flops for kernel in _KERNELS},
}
