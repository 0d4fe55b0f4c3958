"""A small pipeline of diffusers, and the call of it that the tests make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STEPS = 2


@dataclass(frozen=True)
class Run:
    """``build`` makes the pipeline; ``call``: its arguments; ``converted``: the components that are."""

    build: Callable[[], Any]
    call: dict[str, Any]
    converted: tuple[str, ...] = ("unet", "vae")

    def __call__(self, pipe: Any, seed: int = 7, **more: Any) -> Tensor:
        """The picture or clip."""
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": STEPS, "output_type": "pt", **self.call, **more}
        return pipe(generator=torch.Generator().manual_seed(seed), return_dict=False, **call)[0]
