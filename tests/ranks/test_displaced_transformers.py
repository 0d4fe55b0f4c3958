"""Displaced steps of diffusion transformers: keys and values of the last step, against the same on one device."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from tests.support.oracle import random_tensor
from tests.support.simulation import Simulation
from tests.support.threads import run_ranks
from tests.support.transports.late import late
from tests.support.zoo.image_transformers import IMAGES
from tests.support.zoo.token_transformers import TOKENS
from tests.support.zoo.transformer import Transformer

STEPS = 4
TOLERANCE = 1e-9  # fp64, over all steps
THREE = (0, 6, 12, 16)  # rows of the image: 3, 3 and 2 rows of patches


@dataclass(frozen=True)
class Case:
    """``joint``: bounds of image and text tokens together, of which none changes its rank on the way there."""

    row: Transformer
    image: tuple[int, ...]
    bounds: tuple[int, ...]
    joint: tuple[tuple[int, ...], ...] = ()

    def noise_in(self, model: nn.Module, x: Any, time: float) -> Any:
        times = torch.tensor([time] * 2)
        if "num_embeds_ada_norm" in self.row.config:
            times = times.long()
        out = model(**(self.row.arguments() | {"hidden_states": x, "timestep": times}))
        out = out.sample if hasattr(out, "sample") else out[0]
        return out if x.ndim == 3 else out[:, : x.shape[1]]

    def denoise(self, model: nn.Module, x: Any, step: int) -> Any:
        """One step of a loop in which the image changes a little."""
        return x - 0.2 * self.noise_in(model, x, 7 - step)


def square(name: str, **inputs: Any) -> Transformer:
    row = IMAGES[name]
    return replace(row, config={**row.config, "sample_size": 16}, inputs={**row.inputs, **inputs})


def flux(tokens: int) -> Transformer:
    row = TOKENS["FluxTransformer2DModel, text replicated"]
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(tokens // 5), torch.arange(5)).double()
    return replace(row, inputs={**row.inputs, "img_ids": grid})


CASES = {
    "DiT": Case(square("DiTTransformer2DModel"), (2, 4, 16, 16), THREE),
    "PixArt": Case(square("PixArtTransformer2DModel"), (2, 4, 16, 16), THREE),
    "SD3": Case(IMAGES["SD3Transformer2DModel"], (2, 4, 16, 10), THREE, ((0, 15, 30, 40), (0, 15, 30, 45))),
    "FLUX": Case(flux(40), (2, 40, 4), (0, 10, 25, 40), ((0, 15, 30, 45),)),
}


@cache
def simulated(name: str, policy: str) -> list[Tensor]:
    case = CASES[name]
    model, images = case.row.build(), [random_tensor(case.image)]
    with torch.no_grad(), Simulation(policy, 1, case.bounds, case.joint) as one_device:
        for step in range(STEPS):
            one_device.begin_step()
            images.append(case.denoise(model, images[-1], step))
    return images[1:]


def converted(case: Case, model: nn.Module) -> nn.Module:
    own = copy.deepcopy(model)
    return distpatch.convert_model(own, dist.group.WORLD, output="shard", fallback="error", **case.row.options)


def sharded(case: Case, x: Tensor, bounds: tuple[int, ...] | None = None) -> Any:
    return distpatch.shard(x, dist.group.WORLD, dim=1 if x.ndim == 3 else -2, bounds=bounds)


@pytest.mark.parametrize("policy", ["full_sync", "corrected_async_gn", "no_sync"])
@pytest.mark.parametrize("name", CASES)
def test_simulation(name: str, policy: str) -> None:
    """After the two steps of the warm-up, which are those of one device, keys and values of other ranks are late."""
    case = CASES[name]
    model = case.row.build()

    def body(rank: int) -> list[Tensor]:
        own, x, images = converted(case, model), sharded(case, random_tensor(case.image), case.bounds), []
        with torch.no_grad(), distpatch.displaced(own, policy=policy, warmup_steps=1) as steps:
            for step in range(STEPS):
                x = case.denoise(own, x, step)
                images.append(distpatch.gather(x))
            assert steps.synchronous == (STEPS if policy == "full_sync" else 2)
        return images

    with late(delay_s=0.001) if policy == "corrected_async_gn" else contextlib.nullcontext():
        ranks = run_ranks(3, body, keep=True)
    expected, exact = simulated(name, policy), simulated(name, "full_sync")
    for images in ranks:
        for image, right in zip(images, expected, strict=True):
            torch.testing.assert_close(image, right, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(images[:2], exact[:2], rtol=TOLERANCE, atol=TOLERANCE)
    differs = float((expected[-1] - exact[-1]).abs().max())
    assert (differs < 1e-4) == (policy == "full_sync"), differs


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_change_is_exact(name: str) -> None:
    """Nor are tokens of text and image that change their rank, each to its place."""
    case = CASES[name]
    x, model = random_tensor(case.image), case.row.build()
    with torch.no_grad():
        right = case.noise_in(model, x, 7)

    def body(rank: int) -> None:
        own, part = converted(case, model), sharded(case, x)
        with torch.no_grad(), distpatch.displaced(own, warmup_steps=0) as steps:
            for _ in range(3):
                found = distpatch.gather(case.noise_in(own, part, 7))
                torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
            assert steps.synchronous == 1

    run_ranks(2, body, keep=True)


def test_error_falls_with_steps_and_warm_up() -> None:
    """Of an image that goes the same way in more and smaller steps, and of one that waits for more of them."""
    case = CASES["PixArt"]
    model = case.row.build()

    def error(own: nn.Module, steps: int, warmup: int) -> float:
        exact, x = random_tensor(case.image), sharded(case, random_tensor(case.image))
        with torch.no_grad(), distpatch.displaced(own, warmup_steps=warmup):
            for step in range(steps):
                x = x - 0.8 / steps * case.noise_in(own, x, 7 - 7 * step / steps)
                exact = exact - 0.8 / steps * case.noise_in(model, exact, 7 - 7 * step / steps)
            return float((distpatch.gather(x) - exact).abs().max())

    def body(rank: int) -> None:
        own = converted(case, model)
        more = [error(own, steps, 1) for steps in (4, 8, 16)]
        longer = [error(own, 8, warmup) for warmup in (0, 2, 4, 7)]
        assert more[0] > more[1] > more[2] > 0 and more[0] > 2 * more[2], more
        assert longer[0] > longer[1] > longer[2] > 1e-4 and longer[3] < TOLERANCE, longer

    run_ranks(2, body, keep=True)
