"""The resident peak of a process, and of a GPU the peak of its tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

MIB = 1 << 20
# glibc then returns freed activations at once: the resident peak is what is in use.
PROMPT_FREE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def one_device(wanted: str | None) -> torch.device:
    """That of a process without a group: the first GPU where there is one, or the CPU."""
    return torch.device("cuda:0" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def ready(device: torch.device) -> None:
    """The end of all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_peak(device: torch.device) -> int:
    """The process's largest resident size so far, in bytes; of a GPU, what tensors took there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def reset_resident_peak(device: torch.device) -> int:
    """Forget the resident peak so far; the new one (where Linux does not allow it, still the old one)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        print(f"the resident peak counts from the start of the process: {error}", file=sys.stderr)
    return resident_peak(device)
