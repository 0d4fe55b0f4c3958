"""A diffusion transformer of diffusers in a small config, its inputs, and what of them is sharded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models import transformers
from torch import Tensor, nn


class Random(tuple[int, ...]):
    """The shape of a tensor of random numbers."""


class Masked(tuple[int, ...]):
    """The shape of a boolean mask, of which the last row ends in False."""


def rand(*shape: int) -> Random:
    return Random(shape)


def mask(*shape: int) -> Masked:
    return Masked(shape)


@dataclass(frozen=True)
class Transformer:
    """``inputs``: arguments by name, with shapes in place of tensors. ``options``: of ``convert_model``.

    ``gathered``: the functions that are gathered in a call, where that cannot be helped. ``dtype``: fp32 of those that
    compute steps in it whatever they are given, and refuse fp64 beside it. ``backward``: whether torch has the
    gradients on a CPU.
    """

    cls: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    gathered: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    backward: bool = True

    @property
    def entering(self) -> str:
        """What of the arguments is sharded, in words."""
        named = self.options.get("shard")
        if named is not None:
            return ", ".join(f"{name} {dim}" for name, dim in named.items())
        first = next(iter(self.inputs.values()))
        if getattr(getattr(transformers, self.cls), "_cp_plan", None) and len(first) == 3:
            return "as its plan says"
        return "images" if "dim" not in self.options else f"images, dim={self.options['dim']}"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = getattr(transformers, self.cls)(**self.config)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # gates and last layers begin at 0, or as what was in memory
            if parameter.numel() and (parameter.ndim > 1 or not parameter.any()):
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        return model.to(self.dtype).eval()

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(2)
        return {name: _made(value, generator, self.dtype) for name, value in self.inputs.items()}


def _made(value: Any, generator: torch.Generator, dtype: torch.dtype) -> Any:
    if isinstance(value, Random):
        return torch.randn(tuple(value), generator=generator, dtype=torch.float64).to(dtype)
    if isinstance(value, Masked):
        result = torch.ones(tuple(value), dtype=torch.bool)
        result[-1, ..., -1] = False
        return result
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_made(item, generator, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _made(item, generator, dtype) for key, item in value.items()}
    return value() if callable(value) else value
