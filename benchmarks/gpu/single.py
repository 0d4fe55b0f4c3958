"""What one GPU can show of NCCL, of CUDA graphs and of the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distpatch
from benchmarks.gpu.cases import NETS, Net, denoised, difference, net_error, normal
from benchmarks.gpu.measure import ready, times
from benchmarks.gpu.nets import SdDecoder, seeded
from benchmarks.gpu.section import Row, Section, exact

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-9
MINE = "from benchmarks.gpu.single import small; small()"
SANITIZER_S = 90
FOUND = 9  # the tool's code of its end where it found something


def run(section: Section) -> None:
    device = section.device
    on_gpu = device.type == "cuda"
    section.row("small run", lambda: {"error": small()})
    build = section.pick(full=SdDecoder, tiny=lambda: SdDecoder((8, 8, 16, 16), blocks=1, groups=4))
    pixels = section.pick(full=1024, quick=512, tiny=32)
    if on_gpu:
        section.row("graph of a converted decode, no group", lambda: captured(build, pixels, device, None))
    else:
        section.skip("graph of a converted decode, no group", "no GPU")
    backend = "nccl" if on_gpu else "gloo"
    options = {"device_id": device} if on_gpu else {}
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
    try:
        group = dist.group.WORLD
        for net in NETS:
            section.row(
                f"{net.name}, {backend}, one rank",
                lambda: exact(net_error(net, group, device, train=True), TOLERANCE),  # noqa: B023
            )
        section.row(f"links, {backend}, one rank", lambda: {"ok": str(distpatch.self_test(group).ok)})
        section.row(f"displaced steps, {backend}, one rank", lambda: displaced(NETS[2], group, device))
        if on_gpu:
            section.row("graph of a converted decode, nccl, one rank", lambda: captured(build, pixels, device, group))
    finally:
        dist.destroy_process_group()
    if not on_gpu:
        section.skip("sanitizers", "no GPU")
        return
    section.row("torch's sanitizer of streams, small run", lambda: sanitized([], section, TORCH_CUDA_SANITIZER="1"))
    if found := shutil.which("compute-sanitizer"):
        command = [found, "--error-exitcode", str(FOUND), "--tool", "memcheck"]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that what is beyond a tensor is beyond its allocation
        section.row("compute-sanitizer, small run", lambda: sanitized(command, section, **uncached))
    else:
        section.skip("compute-sanitizer, small run", "it is not on PATH")


def small() -> float:
    """Every net once, forward and backward, converted without a group; the largest difference from plain torch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    worst = max(net_error(net, None, device, train=train) for net in NETS for train in (False, True))
    ready(device)
    assert worst <= TOLERANCE, worst
    return worst


def sanitized(command: list[str], section: Section, **env: str) -> Row:
    """The small run under a tool that ends with an error where it finds one."""
    seconds = max(min(SANITIZER_S, section.seconds_left), 1)
    try:
        done = subprocess.run(
            [*command, sys.executable, "-c", MINE],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"found": f"no end within {seconds:.0f} s"}
    if done.returncode != 0:
        raise RuntimeError(f"ended with code {done.returncode}: {(done.stdout + done.stderr).strip()[-500:]}")
    return {"found": "nothing"}


def captured(build: Any, pixels: int, device: torch.device, group: Any) -> Row:
    """A CUDA graph of a converted decode: its replay on other latents is the eager decode of them; times of both."""
    own = seeded(build).to(device, torch.bfloat16).requires_grad_(False)
    distpatch.convert_model(own, group, fallback="error")
    given, other = (normal((1, 4, pixels // 8, pixels // 8), seed, device, torch.bfloat16) for seed in (1, 2))
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                own.decode(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            picture = own.decode(given)
        right = own.decode(other)
        given.copy_(other)
        graph.replay()
        ready(device)
        error = difference(picture, right)
        eager, replay = times(lambda: own.decode(given), device, 3), times(graph.replay, device, 3)
    return exact(
        error,
        2e-2,  # of bf16, if kernels of another kind are chosen
        eager_host_ms=eager["host_ms"],
        eager_total_ms=eager["total_ms"],
        replay_host_ms=replay["host_ms"],
        replay_total_ms=replay["total_ms"],
    )


def displaced(net: Net, group: Any, device: torch.device) -> Row:
    runs = [denoised(net, g, device, "corrected_async_gn") for g in (group, None)]
    return exact(max(difference(a, b) for a, b in zip(*runs, strict=True)), TOLERANCE)
