"""Nodes for ComfyUI that decode, encode and upscale on all GPUs of the host, by ranks that stay alive between prompts.

ComfyUI finds them in a file of its ``custom_nodes`` folder with one line:

    from distpatch.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distpatch.local.group import LocalGroup, local_group

RANKS = ("INT", {"default": 0, "min": 0, "max": 64, "tooltip": "GPUs; 0: all of this host"})


class _Ranks:
    """The ranks of this process: started by the first prompt that needs them, and anew where it asks for others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._group: LocalGroup | None = None
        self._asked = 0

    def of(self, number: int) -> LocalGroup:
        with self._lock:
            if self._group is None or number != self._asked:
                group = local_group(number or None)
                self._close()
                self._group, self._asked = group, number
            return self._group

    def close(self) -> None:
        """End their processes; the next prompt starts new ones."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()


RANKS_OF_THIS_PROCESS = _Ranks()


class _Node:
    """What ComfyUI asks of each node."""

    CATEGORY = "distpatch"
    REQUIRED: ClassVar[dict[str, tuple[str]]]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - as ComfyUI has it
        return {"required": cls.REQUIRED, "optional": {"ranks": RANKS}}


class VAEDecode(_Node):
    """As ComfyUI's VAE Decode: pictures (B, H, W, C) in [0, 1] of latents; frames of a video are pictures."""

    REQUIRED: ClassVar = {"samples": ("LATENT",), "vae": ("VAE",)}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"

    def decode(self, vae: Any, samples: dict[str, Any], ranks: int = 0) -> tuple[Tensor]:
        """Each of a batch by itself: its rows are shared out."""
        vae.throw_exception_if_invalid()
        group, found, given = RANKS_OF_THIS_PROCESS.of(ranks), [], samples["samples"]
        given = given.unbind()[0] if given.is_nested else given  # of a video with its sound: the video
        for latents in given.to(vae.vae_dtype).split(1):
            pixels = group.decode(vae.first_stage_model, latents)
            found.append(vae.process_output(pixels.to(vae.output_device).float()).movedim(1, -1))
        pictures = torch.cat(found)
        return (pictures.flatten(0, -4) if pictures.ndim > 4 else pictures,)


class VAEEncode(_Node):
    """As ComfyUI's VAE Encode: latents of pictures, which are the frames of one clip for a VAE of videos."""

    REQUIRED: ClassVar = {"pixels": ("IMAGE",), "vae": ("VAE",)}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"

    def encode(self, vae: Any, pixels: Tensor, ranks: int = 0) -> tuple[dict[str, Tensor]]:
        """Cropped as ComfyUI does, to what the VAE's latents can say."""
        vae.throw_exception_if_invalid()
        pictures = vae.vae_encode_crop_pixels(pixels[..., :3]).movedim(-1, 1)
        if vae.latent_dim == 3 and pictures.ndim == 4:
            is_video = not getattr(vae, "not_video", False)
            pictures = pictures.movedim(0, 1).unsqueeze(0) if is_video else pictures.unsqueeze(2)
        group, found = RANKS_OF_THIS_PROCESS.of(ranks), []
        for picture in vae.process_input(pictures).to(vae.vae_dtype).split(1):
            found.append(group.encode(vae.first_stage_model, picture).to(vae.output_device).float())
        return ({"samples": torch.cat(found)},)


class UpscaleWithModel(_Node):
    """As ComfyUI's Upscale Image (using Model), of whole pictures where that takes tiles."""

    REQUIRED: ClassVar = {"upscale_model": ("UPSCALE_MODEL",), "image": ("IMAGE",)}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"
    _last: ClassVar[tuple[Any, nn.Module] | None] = None  # the ranks know a model by the object that they were sent

    def upscale(self, upscale_model: Any, image: Tensor, ranks: int = 0) -> tuple[Tensor]:
        kind = type(self)
        if kind._last is None or kind._last[0] is not upscale_model:
            kind._last = upscale_model, _Described(upscale_model)
        group, net = RANKS_OF_THIS_PROCESS.of(ranks), kind._last[1]
        pictures = torch.cat([group(net, picture) for picture in image.movedim(-1, 1).split(1)])
        return (pictures.movedim(1, -1).clamp(0, 1),)


class _Described(nn.Module):
    """A model of spandrel together with its descriptor, which knows how pictures are padded for it."""

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.model, self.descriptor = descriptor.model, descriptor
        self.eval()

    def forward(self, picture: Tensor) -> Tensor:
        result: Tensor = self.descriptor(picture)
        return result


NODE_CLASS_MAPPINGS = {
    "DistpatchVAEDecode": VAEDecode,
    "DistpatchVAEEncode": VAEEncode,
    "DistpatchUpscaleWithModel": UpscaleWithModel,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DistpatchVAEDecode": "VAE Decode (distpatch, all GPUs)",
    "DistpatchVAEEncode": "VAE Encode (distpatch, all GPUs)",
    "DistpatchUpscaleWithModel": "Upscale Image using Model (distpatch, all GPUs)",
}
