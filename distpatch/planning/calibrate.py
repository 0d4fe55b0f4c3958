"""``calibrate``: the rates of this machine, measured, for a plan's estimate of time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from distpatch.comm.communicator import Communicator, Group, communicator
from distpatch.comm.row_exchange import fetch_rows
from distpatch.layout.rows import even_bounds
from distpatch.planning.hardware import Device, Link, Protocol

ROUNDS = 5
CHANNELS, SIDE = 128, 128  # of the convolution that is timed: 9.7 GFLOPs, in the middle of a decoder's
BIG_BYTES, MIDDLE_BYTES, SMALL_BYTES = 64 << 20, 256 << 10, 4 << 10
DTYPES = {"float32": torch.float32, "half": torch.bfloat16}


def calibrate(
    group: Group = None, *, device: torch.device | str = "cpu", seconds: float = 2.0
) -> tuple[Device, Link | None]:
    """Measure the rates of ``device`` and, with a group of several ranks, of the link between neighbours.

    >>> device, link = distpatch.calibrate(torch.distributed.group.WORLD)
    >>> print(distpatch.plan(vae, latents, method="decode", device=device, link=link).table())

    FLOPs a second are those of a 3 × 3 convolution of 128 channels (float32, bfloat16), float64's of a matrix
    product; bandwidth is that of an addition in memory, the overhead that of an operation on one number. The link
    is measured by an exchange in which every rank fetches rows of the next. About ``seconds`` for all. Collective:
    every rank of the group calls it, and each measures its own device, at the same time as the others.
    """
    place = torch.device(device)
    each = seconds / 6
    with torch.no_grad():
        rates = {name: _of_convolution(dtype, place, each) for name, dtype in DTYPES.items()}
        square = torch.randn(512, 512, dtype=torch.float64, device=place)
        rates["float64"] = 2 * 512**3 / _seconds(lambda: square @ square, place, each)
        big = torch.ones(BIG_BYTES // 4, device=place)
        bandwidth = 2 * BIG_BYTES / _seconds(lambda: big.add_(1), place, each)
        one = torch.ones(1, device=place)
        overhead = _seconds(lambda: one.add_(1), place, each)
        comm = communicator(group, place)
        link = _link(comm, place) if comm.size > 1 else None
    # A CPU's next operation waits for it; a GPU's only where the host is late.
    every, launch = (overhead, 0.0) if place.type == "cpu" else (0.0, overhead)
    name, memory_bytes = _name(place), _memory_bytes(place)
    return Device(name, rates, bandwidth, memory_bytes, "", every, "", launch, place.type), link


def _of_convolution(dtype: torch.dtype, place: torch.device, budget: float) -> float:
    """FLOPs a second, of as large an image, up to ``SIDE``, as can be convolved often enough within the budget.

    A CPU without instructions for a dtype may take a thousand times as long as for another.
    """
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, device=place).to(dtype)
    for side in (2**i for i in range(2, SIDE.bit_length())):
        conv = partial(F.conv2d, torch.randn(1, CHANNELS, side, side, device=place).to(dtype), weight, padding=1)
        once = min(_timed(conv, place, 1) for _ in range(2))
        if 4 * once * (3 + ROUNDS) > budget:
            break
    return 2 * 9 * CHANNELS * CHANNELS * side * side / _seconds(conv, place, budget)


def _link(comm: Communicator, place: torch.device) -> Link:
    bounds = even_bounds(comm.size, comm.size)
    needs = tuple((((rank + 1) % comm.size, (rank + 1) % comm.size + 1),) for rank in range(comm.size))

    def exchange(size_bytes: int) -> Callable[[], object]:
        row = torch.ones(1, size_bytes // 4, device=place)
        return lambda: fetch_rows(row, 0, bounds, needs, comm.name, "calibrate", False)

    # As many rounds on every rank: each takes part in the others'.
    sizes = (SMALL_BYTES, MIDDLE_BYTES, BIG_BYTES)
    small, middle, big = (_median_seconds(exchange(size), place, 4 * ROUNDS) for size in sizes)
    bandwidth = (BIG_BYTES - MIDDLE_BYTES) / max(big - middle, 1e-9)
    of_few_bytes = Protocol("small", (MIDDLE_BYTES - SMALL_BYTES) / max(middle - small, 1e-9), small, 0.0)
    start = max(middle - MIDDLE_BYTES / bandwidth, min(small, middle))
    name = f"{comm.size} ranks on {_name(place)}, measured"
    return Link(name, bandwidth, start, 0.0, small=(of_few_bytes,), small_bytes=MIDDLE_BYTES)


def _seconds(work: Callable[[], object], place: torch.device, budget: float) -> float:
    """Of one call, many together: the median of a few rounds that take about ``budget`` seconds."""
    once = max(_timed(work, place, 3) / 3, 1e-7)
    calls = max(int(budget / ROUNDS / once), 1)
    return median(_timed(work, place, calls) / calls for _ in range(ROUNDS))


def _median_seconds(work: Callable[[], object], place: torch.device, rounds: int) -> float:
    _timed(work, place, 2)
    return median(_timed(work, place, 1) for _ in range(rounds))


def _timed(work: Callable[[], object], place: torch.device, calls: int) -> float:
    _synchronize(place)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    _synchronize(place)
    return time.perf_counter() - started


def _synchronize(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def _name(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    threads = torch.get_num_threads()
    return f"{place.type}, {threads} thread{'s' * (threads > 1)}"


def _memory_bytes(place: torch.device) -> float:
    if place.type == "cuda":
        return float(torch.cuda.get_device_properties(place).total_memory)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return float("inf")
