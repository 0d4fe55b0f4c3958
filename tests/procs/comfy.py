"""What ComfyUI's nodes are given, written down from its interface: a VAE around its model, and spandrel's descriptor.

Nothing here may touch torch.distributed: processes of their own import it.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FirstStage(nn.Module):
    """As ComfyUI's ``AutoencodingEngine``: ``encode`` and ``decode`` return tensors."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.down, self.norm = conv(3, 4, 3, stride=(2,) * 2 if dims == 2 else (1, 2, 2), padding=1), nn.GroupNorm(2, 4)
        self.up = conv(4, 3, 3, padding=1)
        self.dies_on_rank: int | None = None

    def encode(self, x: Tensor) -> Tensor:
        return self.norm(self.down(x))

    def decode(self, z: Tensor) -> Tensor:
        if self.dies_on_rank is not None and torch.distributed.get_rank() == self.dies_on_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.up(F.interpolate(self.norm(z), scale_factor=(1,) * (z.ndim - 4) + (2, 2)))


class VAE:
    """As ``comfy.sd.VAE``, of what nodes use; ``decode`` and ``encode`` are what one device computes."""

    def __init__(self, dims: int = 2) -> None:
        torch.manual_seed(0)
        self.first_stage_model = FirstStage(dims).double().eval()
        self.vae_dtype, self.output_device, self.latent_dim, self.not_video = torch.float64, "cpu", dims, False
        self.process_input = lambda image: image * 2 - 1
        self.process_output = lambda image: torch.clamp((image + 1) / 2, 0, 1)

    def throw_exception_if_invalid(self) -> None:
        if self.first_stage_model is None:
            raise RuntimeError("ERROR: VAE is invalid: None")

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        for dim in (-3, -2):
            pixels = pixels.narrow(dim, pixels.shape[dim] % 2 // 2, pixels.shape[dim] // 2 * 2)
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return self.process_output(self.first_stage_model.decode(latents.double()).float()).movedim(1, -1)

    def encode(self, pixels: Tensor) -> Tensor:
        pictures = self.vae_encode_crop_pixels(pixels).movedim(-1, 1)
        pictures = pictures.movedim(0, 1).unsqueeze(0) if self.latent_dim == 3 else pictures
        return self.first_stage_model.encode(self.process_input(pictures).double()).float()


class Descriptor:
    """As spandrel's ``ImageModelDescriptor``: no module, and pads pictures to what its model takes."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.scale = 2
        self._model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2)).eval()

    @property
    def model(self) -> nn.Module:
        return self._model

    def __call__(self, picture: Tensor) -> Tensor:
        rows, columns = picture.shape[-2:]
        padded = F.pad(picture, (0, -columns % 4, 0, -rows % 4), mode="reflect")
        result: Any = self.model(padded)
        return result[..., : rows * 2, : columns * 2].clamp(0, 1)
