"""What ``distpatch doctor`` says of a machine, and of the model that is to run there."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distpatch
from distpatch.cli import machine as machines
from distpatch.cli.advice import Advice, advise
from tests.launch.commands import invoke

LINK = distpatch.Link("a link", 1e11, 1e-6, 0.0)


def device(**other: Any) -> distpatch.Device:
    flops = {"half": 1e9, "float32": 1e9, "float64": 1e9}
    return distpatch.Device("a device", **{"flops": flops, "bandwidth": 1e12, "memory_bytes": 1e12, **other})


def net(dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)).to(dtype).eval()


def advice(*, link: distpatch.Link | None = LINK, sizes: tuple[int, ...] = (1, 2), **other: Any) -> Advice:
    return advise(net, (1, 3, 64, 64), None, sizes, device(**other), link)


def test_advice_has_reasons() -> None:
    computing = advice()
    assert (computing.ranks, computing.dtype, computing.bound) == (2, "float32", "computing")
    assert computing.options == {"splits": "auto", "policy": "shard"}
    assert any("the fewest within 10% of the fastest" in reason for reason in computing.reasons)
    half = advice(flops={"half": 4e9, "float32": 1e9, "float64": 1e9}, link=None)
    assert (half.ranks, half.dtype) == (1, "bfloat16") and "run it under torchrun" in half.reasons[-1]
    host = advice(flops=dict.fromkeys(("half", "float32", "float64"), 1e15), launch_seconds=1e-3)
    assert host.bound == "host" and host.options["policy"] == "auto"
    assert host.ranks == 1 and any("compile=True" in reason for reason in host.reasons)


def test_advice_knows_what_fits() -> None:
    """A GPU's memory is one rank's own, that of a host is shared; where nothing fits it says so."""
    whole = advice(sizes=(1,)).memory_bytes
    assert advice(memory_bytes=0.9 * whole, link=None).ranks == 2
    assert advice(memory_bytes=0.9 * whole, link=None, kind="cpu").ranks == 0
    nothing = advice(memory_bytes=1000.0)
    assert nothing.ranks == 0 and "more ranks (--world-size)" in nothing.reasons[-1]
    assert nothing.lines()[0] == "RECOMMENDED none of these, in float32"


def test_advice_of_a_mesh_where_sending_takes_longest() -> None:
    slow = distpatch.Link("slow", 1e3, 0.0, 0.0)
    fast = dict.fromkeys(("half", "float32", "float64"), 1e15)
    found = advice(link=slow, flops=fast, sizes=(4,))
    assert found.bound == "sending" and found.options == {"splits": "auto", "policy": "shard", "mesh": "2x2"}


def test_a_machine_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three reach each other; what is known of the versions is said, and what nobody looked at."""
    about = types.SimpleNamespace(name="a GPU", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: about)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: 2 not in {i, j})
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(machines.shutil, "which", lambda name: None)
    found = machines.machine()
    assert found["peer_access"] == [[True, True, False], [True, True, False], [False, False, True]]
    text = machines.lines(found)
    assert text[0] == "GPU 0: a GPU, 80 GiB, capability 9.0"
    assert text[3].endswith("but for 0 to 2, 1 to 2, 2 to 0, 2 to 1")
    assert any(line.startswith("KNOWN FAULT cuDNN 9.8 to 9.14 returns wrong values") for line in text)
    assert found["not_looked_at"] == ["what lies between the GPUs (NVLink, PCIe): there is no nvidia-smi"]


def test_doctor_recommends(folder: Path) -> None:
    given = ("doctor", folder, "--device", "cpu", "--shape", "1,4,8,8", "--world-size", 1)
    done = invoke(*given)
    assert done.exit_code == 0 and "RECOMMENDED 1 rank(s) in " in done.stdout, done.output
    assert "NOT LOOKED AT GPUs" in done.stdout or torch.cuda.is_available()
    done = invoke("doctor", folder, "--shape", "1,5,8,8")
    assert done.exit_code == 2 and "AutoencoderKL.decode takes (B, 4, H, W)" in done.stderr
    numbers = json.loads(invoke("doctor", "--device", "cpu", "--json").stdout)
    assert numbers["recommendation"] is None and "host-bound" in numbers["machine"]["not_looked_at"][-1]
