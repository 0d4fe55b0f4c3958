"""What operations and transfers cost in time: a device by three rates, a link by a rate and two latencies.

A kernel takes as long as its FLOPs or its bytes do, whichever is longer (the roofline of Williams, Waterman and
Patterson, CACM 52(4), 2009); kernels and transfers follow one another. With the rates of a data sheet this is
the least time that the hardware allows, which no run reaches; ``distpatch.calibrate`` measures a machine's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from distpatch.meter import Kernel
from distpatch.trace import Record

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
HALF = {torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """``flops``: floating-point operations a second of "half", "tf32", "float32" and "float64"; ``bandwidth``:
    of its memory, bytes a second; ``overhead_seconds``: of each operation; ``link``: to others of its host.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory_bytes: float
    link: str = ""
    overhead_seconds: float = 0.0
    source: str = ""

    def seconds(self, kernel: Kernel) -> float:
        return self.overhead_seconds + max(kernel.flops / self.rate(kernel), kernel.moved_bytes / self.bandwidth)

    def rate(self, kernel: Kernel) -> float:
        """FLOPs a second; torch computes convolutions of float32, but not its matrix products, in TF32."""
        if kernel.dtype in HALF:
            return self.flops["half"]
        if kernel.dtype == torch.float64:
            return self.flops["float64"]
        return self.flops["tf32" if "conv" in kernel.name and "tf32" in self.flops else "float32"]


@dataclass(frozen=True)
class Link:
    """``bandwidth``: bytes a second that a rank sends; ``start_seconds``: of an exchange; ``hop_seconds``: of each
    message that follows another (a ring's).
    """

    name: str
    bandwidth: float
    start_seconds: float
    hop_seconds: float
    source: str = ""

    def seconds(self, record: Record) -> float:
        hops = 1 if record.kind == "p2p" else record.messages  # a batch goes out at once
        if record.kind != "p2p" and not record.messages:
            return 0.0
        return self.start_seconds + hops * self.hop_seconds + record.sent_bytes / self.bandwidth


def _rates(half: float, tf32: float, float32: float, float64: float) -> dict[str, float]:
    return {"half": half * TERA, "tf32": tf32 * TERA, "float32": float32 * TERA, "float64": float64 * TERA}


# Dense rates (no sparsity), without boost beyond what the data sheet says.
DEVICES = {
    device.name: device
    for device in (
        Device("H200", _rates(989, 494, 67, 67), 4.8 * TERA, 141 * GIGA, "NVLink 4", 0, "NVIDIA H200 data sheet (SXM)"),
        Device("H100", _rates(989, 494, 67, 67), 3.35 * TERA, 80 * GIGA, "NVLink 4", 0, "NVIDIA H100 data sheet (SXM)"),
        Device(
            "A100-80GB",
            _rates(312, 156, 19.5, 19.5),
            2.039 * TERA,
            80 * GIGA,
            "NVLink 3",
            0,
            "NVIDIA A100 data sheet (80 GB SXM)",
        ),
        Device(
            "A100-40GB",
            _rates(312, 156, 19.5, 19.5),
            1.555 * TERA,
            40 * GIGA,
            "NVLink 3",
            0,
            "NVIDIA A100 data sheet (40 GB SXM)",
        ),
        Device("L40S", _rates(362, 183, 91.6, 1.4), 864 * GIGA, 48 * GIGA, "PCIe 4", 0, "NVIDIA L40S data sheet"),
        Device("L4", _rates(121, 60, 30.3, 0.5), 300 * GIGA, 24 * GIGA, "PCIe 4", 0, "NVIDIA L4 data sheet"),
        Device(
            "RTX 4090",
            _rates(165.2, 82.6, 82.6, 1.3),
            1.008 * TERA,
            24 * GIGA,
            "PCIe 4",
            0,
            "NVIDIA Ada GPU architecture white paper, appendix A (FP16 with FP32 accumulation)",
        ),
        Device(
            "MI300X",
            _rates(1307, 654, 163, 163),
            5.3 * TERA,
            192 * GIGA,
            "Infinity Fabric",
            0,
            "AMD Instinct MI300X data sheet",
        ),
    )
}

_NCCL = "latencies: NCCL src/graph/tuning.cc, ring with the Simple protocol"
# Bandwidths are one direction's: half of what data sheets add up.
LINKS = {
    link.name: link
    for link in (
        Link("NVLink 4", 450 * GIGA, 8.4 * MICRO, 3.4 * MICRO, f"NVIDIA H100 data sheet; {_NCCL}"),
        Link("NVLink 3", 300 * GIGA, 8.4 * MICRO, 3.4 * MICRO, f"NVIDIA A100 data sheet; {_NCCL}"),
        Link("Infinity Fabric", 64 * GIGA, 8.4 * MICRO, 3.4 * MICRO, f"AMD MI300X data sheet, one peer; {_NCCL}"),
        Link("PCIe 5", 63 * GIGA, 8.4 * MICRO, 5.7 * MICRO, f"PCI Express 5.0, 16 lanes; {_NCCL}"),
        Link("PCIe 4", 31.5 * GIGA, 8.4 * MICRO, 5.7 * MICRO, f"PCI Express 4.0, 16 lanes; {_NCCL}"),
        Link("InfiniBand NDR", 50 * GIGA, 8.4 * MICRO, 9.6 * MICRO, f"NDR, 400 Gb/s a port; {_NCCL}"),
        Link("InfiniBand HDR", 25 * GIGA, 8.4 * MICRO, 9.6 * MICRO, f"HDR, 200 Gb/s a port; {_NCCL}"),
        Link("Ethernet 100", 12.5 * GIGA, 8.4 * MICRO, 9.6 * MICRO, f"100 Gb/s; {_NCCL}, which is no TCP's"),
    )
}
RANKS_OF_A_HOST = 8
BETWEEN_HOSTS = "InfiniBand NDR"


def device_named(device: Device | str) -> Device | None:
    """One of ``DEVICES`` by its name; None for "cpu", of which nothing is known until it is calibrated."""
    if isinstance(device, Device):
        return device
    if device == "cpu":
        return None
    if device not in DEVICES:
        raise ValueError(
            f"device is one of {', '.join(DEVICES)}, cpu, or a distpatch.Device (distpatch.calibrate measures this "
            f"machine's); got {device!r}"
        )
    return DEVICES[device]


def link_named(link: Link | str | None, device: Device | None, world_size: int) -> Link | None:
    """One of ``LINKS`` by its name; None is the device's own, and the network where a host has too few ranks."""
    if isinstance(link, Link):
        return link
    if link is None:
        if device is None or not device.link:
            return None
        link = device.link if world_size <= RANKS_OF_A_HOST else BETWEEN_HOSTS
    if link not in LINKS:
        raise ValueError(f"link is one of {', '.join(LINKS)}, or a distpatch.Link; got {link!r}")
    return LINKS[link]


def compute_seconds(kernels: Mapping[Kernel, int], device: Device) -> float:
    return sum(times * device.seconds(kernel) for kernel, times in kernels.items())


def transfer_seconds(records: Iterable[Record], link: Link) -> float:
    return sum(link.seconds(record) for record in records)
