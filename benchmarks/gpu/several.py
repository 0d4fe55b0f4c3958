"""Two or more GPUs over NCCL, a process each: decodes by size, halos by size, and how soon a failure is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from benchmarks.gpu.cases import difference, normal
from benchmarks.gpu.decode import BF16, latents
from benchmarks.gpu.measure import peak_mib, ready, times
from benchmarks.gpu.nets import SdDecoder, seeded
from benchmarks.gpu.processes import Outcome, Say, failures, in_processes
from benchmarks.gpu.section import Row, Section

ROUNDS = 5
EXCHANGES = 20
CHECKED_PIXELS = 1024  # up to this size compared with one device
BF16_ERROR = 5e-2  # over the largest value: other kernels for other heights
ABORT_S = 60.0
LAST = 3  # calls before the one in which a rank fails


def run(section: Section) -> None:
    gpus = section.where.gpus
    if gpus == 1:
        for name in ("decodes by ranks", "halos", "a rank fails"):
            section.skip(name, "1 GPU")
        return
    backend, worlds = ("nccl", [n for n in (2, 4, 8) if n <= gpus]) if gpus else ("gloo", [2])
    small = section.where.size == "tiny"
    sizes = section.pick(full=(512, 1024, 2048, 4096), quick=(512, 1024), tiny=(32,))
    start = partial(in_processes, backend=backend, gpus=gpus)
    for world in ([1] if gpus else []) + worlds:
        body = partial(decodes, sizes=sizes, small=small)
        at_once(
            section, start, world, body, [(f"{n}²", f"SD decoder {n}², bf16, {backend}, {world} ranks") for n in sizes]
        )
    kibs = section.pick(full=(4, 64, 1024, 16384), tiny=(4, 64))
    names = [(f"{kib}", f"halo of {kib} KiB, {backend}") for kib in kibs]
    at_once(section, start, 2, partial(halos, kibs=kibs), names)
    section.row(f"rank 1 of {worlds[-1]} fails in a call, {backend}", partial(abort, section, start, worlds[-1]))


def at_once(section: Section, start: Any, world: int, body: Any, names: list[tuple[str, str]]) -> None:
    """Several rows of one group of processes; of each the slowest rank counts. ``names``: as said, and of the row."""
    if section.seconds_left <= 0:
        for _, name in names:
            section.skip(name, "out of time")
        return
    outcomes = start(world, body, seconds=section.seconds_left)
    for key, name in names:
        section.row(name, partial(slowest, outcomes, key), anyway=True)


def slowest(outcomes: list[Outcome], key: str) -> Row:
    rows = [outcome.said[key] for outcome in outcomes if key in outcome.said]
    if len(rows) < len(outcomes):
        raise RuntimeError(failures(outcomes))
    return {name: max(row[name] for row in rows) for name in rows[0]}


def decodes(group: Any, device: torch.device, say: Say, sizes: tuple[int, ...], small: bool) -> None:
    build: Callable[[], nn.Module] = (lambda: SdDecoder((8, 8, 16, 16), blocks=1, groups=4)) if small else SdDecoder
    own: Any = seeded(build).to(device, BF16).requires_grad_(False)
    with torch.inference_mode():
        rights = {n: own.decode(latents(n, device, BF16)) for n in sizes if n <= CHECKED_PIXELS}
        distpatch.convert_model(own, group, fallback="error")
        for pixels in sizes:
            z = latents(pixels, device, BF16)
            error = difference(own.decode(z), rights.pop(pixels)) if pixels in rights else 0.0
            if error > BF16_ERROR:
                raise AssertionError(f"{pixels}² differs by {error:.3g}")
            own.decode(z)
            timed = times(lambda: own.decode(z), device, 2 if pixels > 2048 else ROUNDS)  # noqa: B023  called at once
            say(f"{pixels}²", {**timed, **peak_mib(lambda: own.decode(z), device), "error": error})  # noqa: B023


def halos(group: Any, device: torch.device, say: Say, kibs: tuple[int, ...]) -> None:
    """A row of so many KiB to the neighbour and one from it, as a 3 × 3 convolution needs them: median of its wait."""
    for kib in kibs:
        local = torch.zeros(1, 64, 4, kib * 1024 // (64 * 2), device=device, dtype=BF16)
        weight = torch.zeros(1, 64, 3, 3, device=device, dtype=BF16)
        x = distpatch.PatchTensor.from_local(local, group)
        with torch.inference_mode(), distpatch.trace() as t:
            for _ in range(EXCHANGES):
                F.conv2d(x, weight, padding=1)
            ready(device)
        waits = [record.wait_seconds for record in t.records if record.kind == "p2p"]
        say(f"{kib}", {"exchanges": len(waits), "wait_us": 1e6 * median(waits[len(waits) // 2 :])})


class Failing(nn.Module):
    """A convolution, and after it an error on one rank in one of its calls."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)])
        self.fails, self.calls = fails, 0
        self.failed_at = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[0](x)
        self.calls += 1
        if self.fails and self.calls > LAST:
            self.failed_at = time.time()
            raise MemoryError("planted: no memory is left")
        return self.body[1:](x)


def abort(section: Section, start: Callable[..., Any], world: int) -> Row:
    """How long after one rank's error in the middle of a call the others have an error of their own."""
    outcomes = start(world, failing, seconds=min(ABORT_S, max(section.seconds_left, 5)))
    told = [outcome.value for outcome in outcomes if outcome]
    failed_at = max((value["failed_at"] for value in told), default=0.0)
    others = [value for value in told if not value["failed_at"]]
    if len(others) < world - 1 or not failed_at:
        raise RuntimeError(f"not every rank had an error within the time: {failures(outcomes)}")
    return {
        "known_after_s": max(value["known_at"] for value in others) - failed_at,
        "named": f"{sum('rank 1' in value['said'] for value in others)} of {len(others)}",
    }


def failing(group: Any, device: torch.device, say: Say) -> dict[str, Any]:
    model = seeded(lambda: Failing(group.rank() == 1)).to(device)
    distpatch.convert_model(model, group)
    x = normal((1, 4, 16, 16), 1, device, torch.float32)
    try:
        with torch.inference_mode():
            for _ in range(LAST + 1):
                model(x).sum().item()
    except Exception as error:
        return {"failed_at": model.failed_at, "known_at": time.time(), "said": f"{type(error).__name__}: {error}"}
    raise AssertionError("no error")
