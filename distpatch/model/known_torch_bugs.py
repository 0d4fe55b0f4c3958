"""Versions of PyTorch and cuDNN whose large convolutions are known to fail, to be wrong, or to take far more memory.

Only what is reported in public: each entry names its threads. An entry that no supported version can meet
any more costs nothing, and speaks to those who keep an older one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Fault", "faults_of_versions", "known_faults", "warn_of_known_faults"]

LARGE = 2**31  # elements
HALF = ("float16", "bfloat16")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
NEVER = (10**9,)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where, and what helps.

    ``ops``: torch functions; ``dtypes``: none means any; ``numel``: from how many elements of the input
    or output on; ``torch`` and ``cudnn``: from this version on (inclusive), below that one.
    """

    what: str
    advice: str
    threads: tuple[str, ...]
    ops: tuple[str, ...]
    device: str = "cuda"
    dtypes: tuple[str, ...] = ()
    numel: int = 0
    torch: tuple[tuple[int, ...], tuple[int, ...]] = ((0,), NEVER)
    cudnn: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.what} ({', '.join(self.threads)}). {self.advice}"


FAULTS = (
    # cuDNN 9.10.2 returned wrong values for a large (1, 3, 3) convolution in bfloat16 (163539). From 2.9 on torch
    # does without cuDNN for 9.8 to 9.14 (163581, 166480), which raised the peak of a 3-D decoder (166643).
    Fault(
        what="cuDNN 9.8 to 9.14 returns wrong values for large 3-D convolutions in half precision, so that torch "
        "2.9 and later compute them without it, which takes several times the memory",
        advice="Install cuDNN 9.15 or later (pip install 'nvidia-cudnn-cu13>=9.15', or -cu12).",
        threads=("pytorch#163539", "pytorch#163581", "pytorch#166480", "pytorch#166643"),
        ops=("conv3d",),
        dtypes=HALF,
        cudnn=(90800, 91500),
    ),
    # 12.9 GB became 110 GiB as the output passed 2**31 elements (95024), until cuDNN 9.3 took these over (134890).
    # Other reports of the kernels that are used otherwise: an illegal memory access (117736), zeros (87354).
    Fault(
        what="without cuDNN 9.3 or later, torch convolves images of 2**31 elements or more by kernels that take many "
        "times the memory, fail, or have returned zeros",
        advice="Install cuDNN 9.3 or later, or use more splits: each patch is a call of its own.",
        threads=("pytorch#134890", "pytorch#95024", "pytorch#117736", "pytorch#87354"),
        ops=CONVOLUTIONS,
        numel=LARGE,
        cudnn=(0, 90300),
    ),
    Fault(
        what="torch before 2.8 makes depthwise convolutions of 2**31 elements or more fail: their kernel counts with "
        "32 bits",
        advice="Upgrade torch, or use more splits: each patch is a call of its own.",
        threads=("pytorch#152816", "pytorch#153101"),
        ops=("depthwise convolution",),
        numel=LARGE,
        torch=((0,), (2, 8)),
    ),
    # An error (diffusers#3643, 81665, and 144855 for 3-D), then silent zeros in channels_last (141831), mended
    # by 141923 at the end of 2024.
    Fault(
        what="torch before 2.7 refuses nearest up-sampling to 2**31 elements or more, or leaves zeros in it "
        "(channels_last)",
        advice="Upgrade torch, or use more ranks, so that each has fewer rows.",
        threads=("diffusers#3643", "pytorch#81665", "pytorch#141831", "pytorch#144855"),
        ops=("upsample_nearest2d", "upsample_nearest3d"),
        numel=LARGE,
        torch=((0,), (2, 7)),
    ),
)


def known_faults(
    torch_version: str,
    cudnn_version: int | None,
    device: str,
    ops: Collection[str],
    dtype: str = "float32",
    numel: int = 0,
) -> list[Fault]:
    """The faults that a call may meet.

    ``torch_version``: as ``torch.__version__``; ``cudnn_version``: as ``torch.backends.cudnn.version()``
    (91002 is 9.10.2), None where there is none; ``device``: its type, "cpu" or "cuda"; ``ops``: torch
    functions, such as "conv3d"; ``dtype``: without "torch."; ``numel``: elements of the largest input or
    output of one call (0: small, or unknown).
    """
    version = _numbers(torch_version)
    return [
        fault
        for fault in FAULTS
        if fault.device == device
        and not set(fault.ops).isdisjoint(ops)
        and (not fault.dtypes or dtype in fault.dtypes)
        and numel >= fault.numel
        and fault.torch[0] <= version < fault.torch[1]
        and (fault.cudnn is None or (cudnn_version is not None and fault.cudnn[0] <= cudnn_version < fault.cudnn[1]))
    ]


def faults_of_versions(device: str) -> list[Fault]:
    """What the versions installed may meet on a device of this type, whatever is computed there."""
    versions = torch.__version__, _cudnn_version(device), device
    return [
        fault for fault in FAULTS if known_faults(*versions, fault.ops, (fault.dtypes or ("float32",))[0], fault.numel)
    ]


def warn_of_known_faults(model: nn.Module, numel: int = 0) -> None:
    """Warn, once a process, of each fault that the convolutions of a model meet with the versions installed.

    ``numel``: elements of the largest input or output of one call, where it is known. A model is taken to
    stay on the device, and in the dtype, that it has now.
    """
    met: dict[tuple[str, str, tuple[str, ...]], None] = {}  # a set that keeps its order
    for module in model.modules():
        weight = next(module.parameters(), None)
        if isinstance(module, _ConvNd) and weight is not None:
            met[weight.device.type, str(weight.dtype).removeprefix("torch."), _ops(module)] = None
    for device, dtype, ops in met:
        for fault in known_faults(torch.__version__, _cudnn_version(device), device, ops, dtype, numel):
            if fault not in _warned:
                _warned.add(fault)
                warnings.warn(str(fault), stacklevel=3)


_warned: set[Fault] = set()


def _ops(conv: _ConvNd) -> tuple[str, ...]:
    """The torch function of a layer, if its kernel is more than a point, and what some faults call it besides."""
    name = f"conv{len(conv.kernel_size)}d"
    if all(size == 1 for size in conv.kernel_size):
        return (f"pointwise {name}",)
    return (name, "depthwise convolution") if conv.groups == conv.in_channels > 1 else (name,)


def _cudnn_version(device: str) -> int | None:
    """None without cuDNN; torch.backends.cudnn tells MIOpen's version on AMD's devices."""
    if device != "cuda" or torch.version.hip is not None:
        return None
    return torch.backends.cudnn.version()


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0a0+git1234": what stands in front of the first letter."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
