"""Stable Diffusion's decoder on one device: plain and converted, by size, layout and precision."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import distpatch
from benchmarks.gpu.cases import difference, normal
from benchmarks.gpu.measure import measured
from benchmarks.gpu.nets import SdDecoder, UNet, WanDecoder, seeded
from benchmarks.gpu.section import Row, Section

DOUBLE_PIXELS = 512  # up to this size errors are against fp64
LARGE_PIXELS = 2048  # from this size on each call is timed once
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
BF16, FP32 = torch.bfloat16, torch.float32
VARIANTS = {  # dtype, layout, and how it is converted
    "plain, bf16": (BF16, "NCHW", None),
    "converted, bf16": (BF16, "NCHW", {}),
    "converted, bf16, not lazy": (BF16, "NCHW", {"lazy": False}),
    "converted, bf16, one patch, not lazy": (BF16, "NCHW", {"lazy": False, "splits": 1}),
    "plain, bf16, channels_last": (BF16, "channels_last", None),
    "converted, bf16, channels_last": (BF16, "channels_last", {}),
    "converted, bf16, channels_last, not lazy": (BF16, "channels_last", {"lazy": False}),
    "plain, fp32": (FP32, "NCHW", None),
    "converted, fp32": (FP32, "NCHW", {}),
}


def run(section: Section) -> None:
    build = section.pick(full=SdDecoder, tiny=lambda: SdDecoder((8, 8, 16, 16), blocks=1, groups=4))
    sizes = section.pick(full=(512, 1024, 2048, 4096), quick=(512, 1024), tiny=(64,))
    model = seeded(build).requires_grad_(False).to(BF16)  # weights that every precision has
    with torch.inference_mode():
        for pixels in sizes:
            right = reference(section, model, pixels)
            for name, (dtype, layout, options) in VARIANTS.items():
                work = partial(variant, section.device, model, pixels, dtype, layout, options, right)
                section.row(f"{pixels}²: {name}", work, peer=options is None)
            del right
        other_nets(section)


def latents(pixels: int, device: torch.device, dtype: torch.dtype, layout: str = "NCHW") -> Tensor:
    drawn = normal((1, 4, pixels // 8, pixels // 8), 1, device, dtype)
    return drawn.contiguous(memory_format=LAYOUTS[layout])


def reference(section: Section, model: nn.Module, pixels: int) -> Tensor | None:
    """The picture in fp64 or, where that is large, in fp32 of plain torch; None where there is no memory for it."""
    dtype = torch.float64 if pixels <= DOUBLE_PIXELS else FP32
    try:
        return model.to(section.device, dtype)(latents(pixels, section.device, dtype))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def variant(
    device: torch.device,
    model: nn.Module,
    pixels: int,
    dtype: torch.dtype,
    layout: str,
    options: dict | None,
    right: Tensor | None,
) -> Row:
    own = model.to(device, dtype, memory_format=LAYOUTS[layout])
    z = latents(pixels, device, dtype, layout)
    if options is not None:
        distpatch.convert_model(own, fallback="error", **options)
    try:
        error = None if right is None else difference(own.decode(z), right)
        return {**measured(lambda: own.decode(z), device, 1 if pixels >= LARGE_PIXELS else 3), "error": error}
    finally:
        if options is not None:
            distpatch.restore_model(own)


def other_nets(section: Section) -> None:
    """A video decoder of Wan's shape and a U-Net step, plain and converted, in bf16."""
    device = section.device
    wan = section.pick(full=(WanDecoder, 5, 60), tiny=(lambda: WanDecoder(4), 2, 4))
    unet = section.pick(full=(lambda: UNet(context=768), 64), tiny=(lambda: UNet((8, 16), 1, 4, 2, 4, 6), 8))
    build, frames, side = wan
    clip = normal((1, 16, frames, side, side), 1, device, BF16)
    _beside(section, f"Wan decoder, {frames} frames of {8 * side}²", build, [clip])
    build, side = unet
    image = normal((2, 4, side, side), 1, device, BF16)
    text = normal((2, 77, 768 if section.where.size != "tiny" else 6), 2, device, BF16)
    _beside(section, f"U-Net step, batch of 2, latents of {side}²", build, [image, torch.ones(2, device=device), text])


def _beside(section: Section, label: str, build: object, inputs: list[Tensor]) -> None:
    model = seeded(build).to(section.device, BF16).requires_grad_(False)  # type: ignore[arg-type]
    section.row(f"{label}: plain, bf16", lambda: measured(lambda: model(*inputs), section.device, 1), peer=True)

    def converted() -> Row:
        distpatch.convert_model(model, fallback="error")
        return measured(lambda: model(*inputs), section.device, 1)

    section.row(f"{label}: converted, bf16", converted)
