"""What operations and transfers cost in time: a device by three rates, a link by a rate and two latencies a protocol.

A kernel takes as long as its FLOPs or its bytes do, whichever is longer (the roofline of Williams, Waterman and
Patterson, CACM 52(4), 2009); kernels and transfers follow one another. With the rates of a data sheet this is
the least time that the hardware allows, which no run reaches; ``distpatch.calibrate`` measures a machine's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from distpatch.profiling.op_costs import Kernel
from distpatch.profiling.trace import Record

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
HALF = {torch.float16, torch.bfloat16}
# Of one operator of torch, on the host: an estimate (3 to 10 us are usual), not measured on any of these devices.
LAUNCH_SECONDS = 5 * MICRO


@dataclass(frozen=True)
class Device:
    """``flops``: floating-point operations a second of "half", "tf32", "float32" and "float64"; ``bandwidth``:
    of its memory, bytes a second; ``overhead_seconds``: of each operation; ``link``: to others of its host.

    ``launch_seconds``: of the host for each operation, while the device still computes those before: the operation
    takes this long, or its own time, whichever is longer. ``kind``: whose rules a plan follows ("cuda", "cpu").
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory_bytes: float
    link: str = ""
    overhead_seconds: float = 0.0
    source: str = ""
    launch_seconds: float = 0.0
    kind: str = "cuda"

    def seconds(self, kernel: Kernel) -> float:
        computing = max(kernel.flops / self.rate(kernel), kernel.moved_bytes / self.bandwidth)
        return self.overhead_seconds + max(computing, self.launch_seconds * kernel.is_launched)

    def rate(self, kernel: Kernel) -> float:
        """FLOPs a second; torch computes convolutions of float32, but not its matrix products, in TF32."""
        if kernel.dtype in HALF:
            return self.flops["half"]
        if kernel.dtype == torch.float64:
            return self.flops["float64"]
        return self.flops["tf32" if "conv" in kernel.name and "tf32" in self.flops else "float32"]


@dataclass(frozen=True)
class Protocol:
    """How messages go: ``bandwidth``, bytes a second that a rank sends; ``start_seconds`` of an exchange;
    ``hop_seconds`` of each message that follows another (a ring's).
    """

    name: str
    bandwidth: float
    start_seconds: float
    hop_seconds: float

    def seconds(self, hops: int, sent_bytes: int) -> float:
        return self.start_seconds + hops * self.hop_seconds + sent_bytes / self.bandwidth


@dataclass(frozen=True)
class Link:
    """``bandwidth``, ``start_seconds`` and ``hop_seconds``: of large messages, as a ``Protocol`` has them; ``small``:
    of what is used for small ones, the quickest for a single number first.

    As NCCL chooses: a collective goes by what is quickest for its size; an exchange by the first of ``small`` where
    each message has at most ``small_bytes`` (NCCL_P2P_LL_THRESHOLD), else by the large ones' protocol.
    """

    name: str
    bandwidth: float
    start_seconds: float
    hop_seconds: float
    source: str = ""
    small: tuple[Protocol, ...] = ()
    small_bytes: int = 16 << 10

    def seconds(self, record: Record) -> float:
        if record.kind != "p2p" and not record.messages:
            return 0.0
        hops = 1 if record.kind == "p2p" else record.messages  # a batch goes out at once
        return min(way.seconds(hops, record.sent_bytes) for way in self._ways(record))

    def _ways(self, record: Record) -> tuple[Protocol, ...]:
        large = Protocol("large", self.bandwidth, self.start_seconds, self.hop_seconds)
        if record.kind != "p2p" or not self.small:
            return large, *self.small
        is_small = record.sent_bytes <= self.small_bytes * max(record.messages, 1)
        return (self.small[0],) if is_small else (large,)


def _rates(half: float, tf32: float, float32: float, float64: float) -> dict[str, float]:
    return {"half": half * TERA, "tf32": tf32 * TERA, "float32": float32 * TERA, "float64": float64 * TERA}


def _device(name: str, rates: dict[str, float], bandwidth: float, gigabytes: float, link: str, source: str) -> Device:
    return Device(name, rates, bandwidth, gigabytes * GIGA, link, 0.0, source, LAUNCH_SECONDS)


# Dense rates (no sparsity), without boost beyond what the data sheet says.
_A100 = "NVIDIA A100 data sheet"
_ADA = "NVIDIA Ada GPU architecture white paper, appendix A (FP16 with FP32 accumulation)"
DEVICES = {
    device.name: device
    for device in (
        _device("H200", _rates(989, 494, 67, 67), 4.8 * TERA, 141, "NVLink 4", "NVIDIA H200 data sheet (SXM)"),
        _device("H100", _rates(989, 494, 67, 67), 3.35 * TERA, 80, "NVLink 4", "NVIDIA H100 data sheet (SXM)"),
        _device("A100-80GB", _rates(312, 156, 19.5, 19.5), 2.039 * TERA, 80, "NVLink 3", f"{_A100} (80 GB SXM)"),
        _device("A100-40GB", _rates(312, 156, 19.5, 19.5), 1.555 * TERA, 40, "NVLink 3", f"{_A100} (40 GB SXM)"),
        _device("L40S", _rates(362, 183, 91.6, 1.4), 864 * GIGA, 48, "PCIe 4", "NVIDIA L40S data sheet"),
        _device("L4", _rates(121, 60, 30.3, 0.5), 300 * GIGA, 24, "PCIe 4", "NVIDIA L4 data sheet"),
        _device("RTX 4090", _rates(165.2, 82.6, 82.6, 1.3), 1.008 * TERA, 24, "PCIe 4", _ADA),
        _device(
            "MI300X", _rates(1307, 654, 163, 163), 5.3 * TERA, 192, "Infinity Fabric", "AMD Instinct MI300X data sheet"
        ),
    )
}


def _nccl(
    name: str, gigabytes: float, hops: tuple[float, float, float], ll: float, source: str, ll128: bool = False
) -> Link:
    """A link as NCCL's tuning model has it: its ring with the protocols LL, LL128 and Simple.

    ``hops``: microseconds of each; ``ll``: most gigabytes a second of LL, which sends a flag with every word. A third
    of the bandwidth is what the model gives LL, 0.92 of it LL128 (only between NVLinks).
    """
    small = [Protocol("LL", min(ll, gigabytes / 3) * GIGA, 6.6 * MICRO, hops[0] * MICRO)]
    if ll128:
        small.append(Protocol("LL128", 0.92 * gigabytes * GIGA, 14.0 * MICRO, hops[1] * MICRO))
    source = f"{source}; latencies and protocols: NCCL src/graph/tuning.cc, its ring"
    return Link(name, gigabytes * GIGA, 8.4 * MICRO, hops[2] * MICRO, source, tuple(small))


_NVLINK, _PCI, _NET = (0.6, 1.9, 3.4), (1.0, 2.5, 5.7), (2.7, 4.0, 14.0)
# Bandwidths are one direction's: half of what data sheets add up.
LINKS = {
    link.name: link
    for link in (
        _nccl("NVLink 4", 450, _NVLINK, 141.0, "NVIDIA H100 data sheet", ll128=True),
        _nccl("NVLink 3", 300, _NVLINK, 87.7, "NVIDIA A100 data sheet", ll128=True),
        _nccl("Infinity Fabric", 64, _NVLINK, 87.7, "AMD MI300X data sheet, one peer, as if it were NVLink"),
        _nccl("PCIe 5", 63, _PCI, 141.0, "PCI Express 5.0, 16 lanes"),
        _nccl("PCIe 4", 31.5, _PCI, 87.7, "PCI Express 4.0, 16 lanes"),
        _nccl("InfiniBand NDR", 50, _NET, 35.0, "NDR, 400 Gb/s a port"),
        _nccl("InfiniBand HDR", 25, _NET, 19.0, "HDR, 200 Gb/s a port"),
        _nccl("Ethernet 100", 12.5, _NET, 19.0, "100 Gb/s, at latencies that are no TCP's"),
    )
}
RANKS_OF_A_HOST = 8
BETWEEN_HOSTS = "InfiniBand NDR"


def device_named(device: Device | str, launch_seconds: float | None = None) -> Device | None:
    """One of ``DEVICES`` by its name; None for "cpu", of which nothing is known until it is calibrated.

    ``launch_seconds``: of another host than the device's own.
    """
    if launch_seconds is not None:
        if launch_seconds < 0:
            raise ValueError(f"host is a number of seconds for each kernel; got {launch_seconds!r}")
        found = device_named(device)
        return None if found is None else replace(found, launch_seconds=launch_seconds)
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
