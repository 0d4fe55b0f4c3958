"""The estimate of time: a roofline and a latency, by hand; presets; the machine's own rates."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch import Device, Link, calibrate
from distpatch.planning import calibrate as calibrating
from distpatch.planning.hardware import (
    DEVICES,
    LAUNCH_SECONDS,
    LINKS,
    Protocol,
    compute_seconds,
    device_named,
    link_named,
    transfer_seconds,
)
from distpatch.profiling.op_costs import Kernel
from distpatch.profiling.trace import Record

TOY = Device("toy", {"half": 100.0, "tf32": 40.0, "float32": 10.0, "float64": 1.0}, 50.0, 1e3, overhead_seconds=0.5)
WIRE = Link("wire", 10.0, 2.0, 1.0)


def kernel(name: str, dtype: torch.dtype, flops: int, moved_bytes: int) -> Kernel:
    return Kernel("op", name, dtype, flops, moved_bytes, False)


@pytest.mark.parametrize(
    ("one", "seconds"),
    [
        (kernel("aten.convolution", torch.float32, 80, 0), 2.0),
        (kernel("aten.mm", torch.float32, 80, 0), 8.0),
        (kernel("aten.mm", torch.bfloat16, 80, 0), 0.8),
        (kernel("aten.convolution", torch.float64, 80, 0), 80.0),
        (kernel("aten.add", torch.float32, 0, 100), 2.0),
        (kernel("aten.convolution", torch.float32, 80, 200), 4.0),
    ],
)
def test_a_kernel_takes_its_flops_or_its_bytes(one: Kernel, seconds: float) -> None:
    assert TOY.seconds(one) == 0.5 + seconds
    assert compute_seconds({one: 3}, TOY) == 3 * (0.5 + seconds)


def test_a_launch_hides_behind_the_kernels_before() -> None:
    """On a device that computes while the host goes on, an operation takes the longer of both; none, none."""
    late = replace(TOY, overhead_seconds=0.0, launch_seconds=3.0)
    assert late.seconds(kernel("aten.add", torch.float32, 0, 100)) == 3.0
    assert late.seconds(kernel("aten.add", torch.float32, 0, 500)) == 10.0
    assert late.seconds(kernel("aten.cat", torch.float32, 0, 0)) == 0.0


QUICK = Link(
    "quick", 100.0, 8.0, 4.0, small=(Protocol("LL", 10.0, 2.0, 1.0), Protocol("LL128", 50.0, 5.0, 2.0)), small_bytes=20
)


@pytest.mark.parametrize(
    ("record", "seconds"),
    [
        (Record("p2p", "conv2d", 40, 2), 2 + 1 + 4),  # two messages of 20 bytes
        (Record("p2p", "conv2d", 42, 2), 8 + 4 + 0.42),  # of 21
        (Record("p2p", "conv2d", 0, 0), 2 + 1),  # received alone
        (Record("all_gather", "norm", 7, 7), 2 + 7 + 0.7),
        (Record("all_gather", "norm", 700, 7), 5 + 14 + 14),
        (Record("all_reduce", "grads", 7000, 7), 8 + 28 + 70),
        (Record("all_gather", "", 0, 0), 0),
    ],
)
def test_small_messages_go_another_way(record: Record, seconds: float) -> None:
    assert QUICK.seconds(record) == pytest.approx(seconds)


def test_a_number_takes_less_than_a_large_message_does() -> None:
    """A norm's few numbers and a halo of a few KiB, on every link; where it is large, the bandwidth of its sheet."""
    for link in LINKS.values():
        plain = replace(link, small=())
        norm, halo, rows = (
            Record("all_gather", "norm", 7 * 512, 7),
            Record("p2p", "conv2d", 2 << 13, 2),
            Record("p2p", "gather", 7 << 30, 7),
        )
        assert link.seconds(norm) < 0.6 * plain.seconds(norm) and link.seconds(halo) < plain.seconds(halo)
        assert link.seconds(rows) == plain.seconds(rows) == pytest.approx((7 << 30) / link.bandwidth, rel=0.01)


def test_a_transfer() -> None:
    batch, ring, alone = (
        Record("p2p", "conv2d", 50, 7),
        Record("all_gather", "norm", 50, 7),
        Record("all_gather", "", 0, 0),
    )
    assert WIRE.seconds(batch) == 2.0 + 1.0 + 5.0
    assert WIRE.seconds(ring) == 2.0 + 7.0 + 5.0
    assert transfer_seconds([batch, ring, alone], WIRE) == 22.0


def test_presets() -> None:
    for name, device in DEVICES.items():
        assert device_named(name) is device and device.source and device.link in LINKS and device.kind == "cuda"
        assert device.launch_seconds == LAUNCH_SECONDS > 0 == device.overhead_seconds
        assert device.flops["half"] >= device.flops["tf32"] >= device.flops["float32"] / 2 > 1e12
        assert 1e11 < device.bandwidth < 1e13 and 1e10 < device.memory_bytes < 1e12
    assert all(link.source and 1e9 < link.bandwidth < 1e12 for link in LINKS.values())
    h100 = DEVICES["H100"]
    assert link_named(None, h100, 8) is LINKS["NVLink 4"]
    assert link_named(None, h100, 9) is LINKS["InfiniBand NDR"], "several hosts"
    assert link_named(WIRE, None, 2) is WIRE and link_named(None, None, 2) is None and device_named("cpu") is None


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="H100.*got 'H101'"):
        device_named("H101")
    with pytest.raises(ValueError, match=r"NVLink 4.*got 'rope'"):
        link_named("rope", TOY, 2)


def test_slow_kernels_are_timed_on_small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution of bfloat16 takes minutes on a CPU that has no instructions for it."""
    sides: list[int] = []

    def timed(work: partial[Tensor], place: object, calls: int) -> float:
        if work.func is F.conv2d:
            sides.append(work.args[0].shape[-1])
        return 1e-3 * calls * (work.args[0].shape[-1] if work.func is F.conv2d else 1)

    monkeypatch.setattr(calibrating, "_timed", timed)
    for budget, largest in ((0.2, 8), (1e-3, 4), (1e3, calibrating.SIDE)):
        sides.clear()
        rate = calibrating._of_convolution(torch.bfloat16, torch.device("cpu"), budget)
        assert max(sides) == largest and len(sides) < 20
        assert rate == pytest.approx(18 * calibrating.CHANNELS**2 * largest / 1e-3)


def test_calibrate() -> None:
    device, link = calibrate(seconds=0.1)
    assert (
        link is None
        and device.kind == "cpu"
        and device.launch_seconds == 0
        and device.name.startswith("cpu")
        and not device.source
    )
    assert all(1e8 < rate < 1e14 for rate in device.flops.values()) and set(device.flops) == {
        "half",
        "float32",
        "float64",
    }
    assert 1e8 < device.bandwidth < 1e13 and 1e-8 < device.overhead_seconds < 1e-2
