"""Time of the host, time of the device, launches and peak memory of one call, on a GPU or a CPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distpatch import LivePeak

MIB = 1 << 20
Call = Callable[[], Any]


def ready(device: torch.device) -> None:
    """The end of all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(call: Call, device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds, medians: ``host_ms`` until the call returns, ``total_ms`` until the device has done it."""
    host, total = [], []
    for _ in range(rounds):
        ready(device)
        started = time.perf_counter()
        result = call()
        host.append(1e3 * (time.perf_counter() - started))
        ready(device)
        total.append(1e3 * (time.perf_counter() - started))
        del result
    return {"host_ms": median(host), "total_ms": median(total)}


def peak_mib(call: Call, device: torch.device) -> dict[str, float]:
    """The most memory of tensors in the call beyond what there was before: ``max_memory_allocated`` of a GPU."""
    if device.type != "cuda":
        with LivePeak() as live:
            call()
        return {"peak_mib": live.peak_mib}
    ready(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    ready(device)
    del result
    return {"peak_mib": (torch.cuda.max_memory_allocated(device) - before) / MIB}


@contextlib.contextmanager
def launches(device: torch.device) -> Iterator[dict[str, float]]:
    """Kernels and copies that are started inside, and ``device_ms``, the time that they take; on a CPU, operations."""
    counted: dict[str, float] = {}
    if device.type != "cuda":
        with _Operations() as operations:
            yield counted
        counted["launches"] = operations.count
        return
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ready(device)
    with torch.profiler.profile(activities=activities) as profile:
        yield counted
        ready(device)
    events = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    counted.update(launches=len(events), device_ms=sum(event.time_range.elapsed_us() for event in events) / 1e3)


def measured(call: Call, device: torch.device, rounds: int = 3) -> dict[str, float]:
    """All of the above, after one call that warms up."""
    call()
    timed = times(call, device, rounds)
    with launches(device) as counted:
        call()
    return {**timed, **counted, **peak_mib(call, device)}


class _Operations(TorchDispatchMode):
    """Counts operators, but not those that only look at memory in another way."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))
