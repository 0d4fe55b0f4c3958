"""One autoencoder of diffusers in a small config, with random weights, and its inputs by height."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models import autoencoders
from torch import Tensor, nn

from tests.support.oracle import random_tensor

Call = Callable[[Any, Tensor], Any]


def encode(model: Any, x: Tensor) -> Any:
    return model.encode(x)


def decode(model: Any, z: Tensor) -> Any:
    return model.decode(z)


def forward(model: Any, x: Tensor) -> Any:
    return model(x)


def sampled(model: Any, x: Tensor) -> Any:
    """The forward of a KL autoencoder, its latents drawn from the posterior."""
    return model(x, sample_posterior=True, generator=torch.Generator().manual_seed(7))


def seeded_decode(model: Any, z: Tensor) -> Any:
    return model.decode(z, generator=torch.Generator().manual_seed(7))


def seeded_forward(model: Any, z: Tensor) -> Any:
    return model(z, generator=torch.Generator().manual_seed(7))


def with_time(model: Any, z: Tensor) -> Any:
    return model.decode(z, torch.tensor([0.05] * z.shape[0], dtype=z.dtype))


def with_time_forward(model: Any, x: Tensor) -> Any:
    return model(x, temb=torch.tensor([0.05] * x.shape[0], dtype=x.dtype))


@dataclass(frozen=True)
class Autoencoder:
    """``image`` and ``latent``: shapes without batch and rows, (channels, frames…, columns); ``scale``: rows of the
    image for one of the latent. ``options``: attributes set on the model. ``dtype``: what it can compute in."""

    cls: str
    config: dict[str, Any]
    image: tuple[int, ...]
    latent: tuple[int, ...]
    scale: int
    calls: dict[str, Call] = field(default_factory=lambda: {"encode": encode, "decode": decode, "forward": sampled})
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The same weights on every call; those that begin as zeros or ones are none here."""
        torch.manual_seed(0)
        model: nn.Module = getattr(autoencoders, self.cls)(**self.config).to(dtype or self.dtype).eval()
        with torch.no_grad():
            for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
                parameter.add_(0.05 * random_tensor(tuple(parameter.shape), index).to(parameter.dtype))
        for name, value in self.options.items():
            setattr(model, name, value)
        return model

    def input(self, call: str, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        shape = self.latent if call == "decode" else self.image
        return random_tensor((1, *shape[:-1], rows, shape[-1]), seed=rows, dtype=dtype or self.dtype)

    def candidates(self, call: str) -> tuple[int, ...]:
        """Even and odd multiples of the scale, heights between them, fewer latent rows than ranks."""
        if call == "decode" or self.scale == 1:
            return (6, 5, 4, 3, 2, 1)
        return (*(n * self.scale for n in (4, 3, 2, 1)), 3 * self.scale - 1, 5 * self.scale // 2)
