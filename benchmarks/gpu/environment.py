"""What the figures have to be read with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distpatch
from benchmarks.gpu.section import Row, Section


def run(section: Section) -> None:
    section.row("versions", versions)
    section.row("processor", processor)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    section.row("GPUs", lambda: {"gpus": gpus})
    for index in range(gpus):
        section.row(f"GPU {index}", lambda: gpu(index))  # noqa: B023  called at once
    section.row("precision", precision)


def versions() -> Row:
    cuda: dict[str, Any] = {"cuda": torch.version.cuda, "cudnn": None, "nccl": None}
    if torch.version.cuda:
        cuda["cudnn"] = torch.backends.cudnn.version()
        cuda["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **cuda,
        "driver": _driver(),
        "distpatch": distpatch.__version__,
    }


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> Row:
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else ())
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": names[0] if names else platform.machine(), "cores": cores}


def gpu(index: int) -> Row:
    about = torch.cuda.get_device_properties(index)
    return {
        "name": about.name,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
    }


def precision() -> Row:
    """As every section has it: no TF32, so that an error in fp32 is the patches' or the ranks'."""
    set_precision()
    return {
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
    }


def set_precision() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
