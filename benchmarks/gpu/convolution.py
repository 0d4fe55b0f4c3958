"""One 3 × 3 convolution of 128 channels, of 0.5 to 4 G elements: plain, in patch_conv's way, and distpatch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from benchmarks.gpu.measure import MIB, peak_mib, times
from benchmarks.gpu.nets import seeded
from benchmarks.gpu.section import Row, Section

CHANNELS = 128
SPLITS = 8
TARGET = 2.4  # times less memory than plain torch
GIGA = 1 << 30
PLAIN, FOLDED, PACKAGE = "plain", f"patch_conv's way, {SPLITS} splits", f"patch_conv package, {SPLITS} splits"
OURS = {f"distpatch, splits={SPLITS}": SPLITS, 'distpatch, splits="auto"': "auto"}
BAND_ROWS = 4
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # over the largest value


def run(section: Section) -> None:
    unit = section.pick(full=GIGA, tiny=1 << 15)  # elements that stand for a giga
    fractions = section.pick(full=(0.5, 1, 2, 4), quick=(0.5, 1), tiny=(0.5, 4))
    dtypes = section.pick(full=(torch.bfloat16, torch.float32, torch.float16), tiny=(torch.bfloat16, torch.float32))
    peaks: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        # What is not ours comes last where its indices are beyond 31 bits: some of it may take minutes there.
        for late in (False, True):
            for dtype in dtypes:
                for fraction in fractions:
                    _one_size(section, int(fraction * unit), f"{fraction:g} G", dtype, late, peaks)


def _one_size(
    section: Section, elements: int, label: str, dtype: torch.dtype, late: bool, peaks: dict[str, dict[str, float]]
) -> None:
    label = f"{label} {str(dtype).removeprefix('torch.')}"
    contestants = {name: dict.get(OURS, name) for name in (*OURS, PLAIN, FOLDED, PACKAGE)}
    chosen = [n for n in contestants if (n not in OURS and elements >= 2 * GIGA) == late]
    if not chosen:
        return
    conv = seeded(lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)).to(section.device, dtype)
    made: list[Tensor] = []

    def measure(call: Callable[[nn.Conv2d, Tensor], Tensor]) -> Row:
        if not made:
            made.append(picture(elements, section.device, dtype))
        (x,) = made
        error = band_error(call(conv, x), x, conv)
        if error > ERRORS[dtype]:
            raise AssertionError(f"differs by {error:.3g}")
        timed = times(lambda: call(conv, x), section.device, 3)
        beyond = peak_mib(lambda: call(conv, x), section.device)["peak_mib"]
        given = x.numel() * x.element_size() / MIB
        return {**timed, "peak_mib": given + beyond, "beyond_input_mib": beyond, "error": error}

    for name in chosen:
        if name == PACKAGE and _package() is None:
            continue
        values = section.row(f"{label}: {name}", partial(measure, _calls()[name]), peer=name not in OURS)
        if values is not None:
            peaks.setdefault(label, {})[name] = values["peak_mib"]
    if PLAIN in chosen:
        judged = partial(verdict, section.device, peaks.get(label, {}))
        section.row(f"{label}: target", judged, anyway=True)


def _calls() -> dict[str, Callable[[nn.Conv2d, Tensor], Tensor]]:
    def ours(splits: int | str) -> Callable[[nn.Conv2d, Tensor], Tensor]:
        return lambda conv, x: distpatch.PatchConv2d(splits=splits, conv2d=conv)(x)

    return {
        PLAIN: lambda conv, x: conv(x),
        FOLDED: lambda conv, x: folded(x, conv.weight, conv.bias, SPLITS),
        PACKAGE: lambda conv, x: _package()(splits=SPLITS, conv2d=conv)(x),
        **{name: ours(splits) for name, splits in OURS.items()},
    }


def folded(x: Tensor, weight: Tensor, bias: Tensor | None, splits: int) -> Tensor:
    """As MIT's patch_conv does it: padded, overlapping patches of rows folded into the batch, one convolution."""
    pad, rows = weight.shape[2] // 2, x.shape[2] // splits
    padded = F.pad(x, (0, 0, pad, pad))
    patches = torch.cat([padded[:, :, i * rows : (i + 1) * rows + 2 * pad] for i in range(splits)])
    del padded
    result = F.conv2d(patches, weight, bias, padding=(0, pad))
    del patches
    return torch.cat(result.chunk(splits), dim=2)


def _package() -> Any:
    """PatchConv2d of the package patch_conv, where it is installed."""
    try:
        import patch_conv
    except ImportError:
        return None
    return patch_conv.PatchConv2d


def picture(elements: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, 128, rows, columns) of normal values: a block that comes again, one row weaker than the one before."""
    pixels = elements // CHANNELS
    columns = 1 << (pixels.bit_length() // 2)
    rows, block = pixels // columns, 64
    generator = torch.Generator().manual_seed(1)
    pattern = torch.randn(CHANNELS, block, columns, generator=generator).to(device, dtype)
    x = torch.empty(1, CHANNELS, rows, columns, device=device, dtype=dtype)
    for start in range(0, rows, block):
        count = min(block, rows - start)
        torch.mul(pattern[:, :count], 1 / (1 + 0.1 * (start // block)), out=x[0, :, start : start + count])
    return x


def band_error(result: Tensor, x: Tensor, conv: nn.Conv2d) -> float:
    """The largest difference from fp64 over the largest value, of bands of rows: edges, seams, and in between.

    Fewer than all rows: fp64 of all of them would not fit beside what is measured.
    """
    rows = x.shape[2]
    assert conv.bias is not None and result.shape == x.shape
    weight, bias = conv.weight.double(), conv.bias.double()
    worst = largest = 0.0
    for split in range(SPLITS + 1):
        lo = min(max(split * rows // SPLITS - BAND_ROWS // 2, 0), rows - BAND_ROWS)
        a, b = max(lo - 1, 0), min(lo + BAND_ROWS + 1, rows)
        padded = F.pad(x[:, :, a:b].double(), (0, 0, a - (lo - 1), lo + BAND_ROWS + 1 - b))
        right = F.conv2d(padded, weight, bias, padding=(0, 1))
        worst = max(worst, (result[:, :, lo : lo + BAND_ROWS] - right).abs().max().item())
        largest = max(largest, right.abs().max().item())
    return worst / largest


def verdict(device: torch.device, peaks: dict[str, float]) -> Row:
    """How many times less memory than plain torch the better of ours takes; of the whole card where plain failed."""
    ours = min((peaks[name] for name in OURS if name in peaks), default=None)
    if ours is None:
        raise AssertionError("none of ours ran")
    if device.type != "cuda":
        return {"times_less": peaks[PLAIN] / ours if PLAIN in peaks else None, "target": "for GPUs"}
    total = torch.cuda.get_device_properties(device).total_memory / MIB
    ratio = peaks.get(PLAIN, total) / ours
    judged = "met" if ratio >= TARGET else "not met"
    return {"times_less": ratio, "target": judged if PLAIN in peaks else f"{judged}, plain torch fails"}
