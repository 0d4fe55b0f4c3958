"""What the machine is: GPUs and how they reach each other, known faults of the versions, and what nobody looked at."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch

from distpatch.model.known_torch_bugs import faults_of_versions
from distpatch.planning.report import GIB

PATIENCE_S = 20


def machine() -> dict[str, Any]:
    """Of this host: ``gpus``, ``topology`` as nvidia-smi draws it, ``known_faults`` of the versions, ``not_looked_at``.

    ``peer_access``: row i says which GPUs' memory GPU i may read.
    """
    each = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    missing = []
    if not each:
        missing.append(
            "GPUs, their memory and links, NCCL, cuDNN and what is known to be wrong with them: "
            f"torch {torch.__version__} sees no CUDA device here"
        )
    topology = _topology() if len(each) > 1 else None
    if len(each) > 1 and topology is None:
        missing.append("what lies between the GPUs (NVLink, PCIe): there is no nvidia-smi")
    return {
        "gpus": [_gpu(place) for place in each],
        "peer_access": [[i == j or torch.cuda.can_device_access_peer(i, j) for j in each] for i in each],
        "topology": topology,
        "known_faults": [str(fault) for fault in faults_of_versions("cuda")] if each else [],
        "not_looked_at": missing,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same as text."""
    told = [
        f"GPU {place}: {gpu['name']}, {gpu['memory_bytes'] / GIB:.0f} GiB, capability {gpu['capability']}"
        for place, gpu in enumerate(found["gpus"])
    ]
    apart = [(i, j) for i, row in enumerate(found["peer_access"]) for j, reaches in enumerate(row) if not reaches]
    if len(found["gpus"]) > 1:
        pairs = ", ".join(f"{i} to {j}" for i, j in apart)
        told.append(f"peer access: all GPUs reach each other's memory{f', but for {pairs}' if apart else ''}")
    if found["topology"]:
        told.append(found["topology"])
    told += [f"KNOWN FAULT {fault}" for fault in found["known_faults"]]
    if found["gpus"] and not found["known_faults"]:
        told.append("no fault is known of these versions of torch and cuDNN")
    return told


def _gpu(place: int) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(place)
    return {"name": about.name, "memory_bytes": about.total_memory, "capability": f"{about.major}.{about.minor}"}


def _topology() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    done = subprocess.run([program, "topo", "-m"], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
