"""Which versions are warned of: the function of version strings, and the warning, given once."""

from __future__ import annotations

import dataclasses
import re
import warnings

import pytest
import torch
from torch import nn

from distpatch import convert_model
from distpatch.model import known_torch_bugs
from distpatch.model.known_torch_bugs import FAULTS, LARGE, warn_of_known_faults

CASES = {
    "cuDNN 9.10, 3-D, bf16": (("2.13.0+cu130", 91002, "cuda", ["conv3d"], "bfloat16"), "pytorch#163539"),
    "cuDNN 9.8, 3-D, fp16": (("2.13.0", 90800, "cuda", ["conv3d"], "float16"), "pytorch#163539"),
    "mended in cuDNN 9.15": (("2.13.0", 91500, "cuda", ["conv3d"], "bfloat16"), None),
    "not yet in cuDNN 9.7": (("2.13.0", 90701, "cuda", ["conv3d"], "bfloat16"), None),
    "fp32": (("2.13.0", 91002, "cuda", ["conv3d"], "float32"), None),
    "2-D": (("2.13.0", 91002, "cuda", ["conv2d"], "bfloat16"), None),
    "on a CPU": (("2.13.0+cpu", None, "cpu", ["conv3d"], "bfloat16"), None),
    "cuDNN 8.9, large": (("2.13.0", 8902, "cuda", ["conv2d"], "float32", LARGE), "pytorch#95024"),
    "cuDNN 8.9, smaller": (("2.13.0", 8902, "cuda", ["conv2d"], "float32", LARGE - 1), None),
    "cuDNN 9.3, large": (("2.13.0", 90300, "cuda", ["conv2d"], "float32", LARGE), None),
    "no cuDNN": (("2.13.0", None, "cuda", ["conv3d"], "bfloat16", LARGE), None),
    "depthwise, torch 2.7": (("2.7.1", 91500, "cuda", ["depthwise convolution"], "float32", LARGE), "pytorch#152816"),
    "depthwise, torch 2.8": (("2.8.0a0+git12", 91500, "cuda", ["depthwise convolution"], "float32", LARGE), None),
    "nearest, torch 2.6": (("2.6", None, "cuda", ["upsample_nearest2d"], "float32", LARGE), "diffusers#3643"),
    "nearest, torch 2.13": (("2.13.0", None, "cuda", ["upsample_nearest2d"], "float32", LARGE), None),
}


@pytest.mark.parametrize(("call", "thread"), CASES.values(), ids=CASES)
def test_known_faults(call: tuple, thread: str | None) -> None:
    found = known_torch_bugs.known_faults(*call)
    assert [thread in fault.threads for fault in found] == ([True] if thread else [])


def test_every_fault_cites_its_threads() -> None:
    for fault in FAULTS:
        assert fault.threads and all(re.fullmatch(r"(pytorch|diffusers)#\d+", thread) for thread in fault.threads)
        assert all(thread in str(fault) for thread in fault.threads) and fault.advice in str(fault)


class Video(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, kernel, device="meta", dtype=torch.bfloat16)


def test_warned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer's own device and dtype; "meta" stands for a GPU here."""
    monkeypatch.setattr(known_torch_bugs, "_warned", set())
    monkeypatch.setattr(known_torch_bugs, "_cudnn_version", lambda device: 91002)
    warn_of_known_faults(Video(3))  # none is known for "meta"
    faults = tuple(dataclasses.replace(fault, device="meta") for fault in FAULTS)
    monkeypatch.setattr(known_torch_bugs, "FAULTS", faults)
    warn_of_known_faults(Video(1))
    warn_of_known_faults(Video(3).float())
    with pytest.warns(UserWarning, match=r"cuDNN 9\.15 or later"):
        convert_model(Video(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_model(Video(3))
