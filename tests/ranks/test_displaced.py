"""Displaced steps against the same algorithm on one device, and what happens when a step is not like the last."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from distpatch.comm.merging import merge_deviations
from distpatch.diffusion.stale_transport import POLICIES, _corrected
from tests.support.oracle import random_tensor
from tests.support.simulation import Simulation
from tests.support.threads import run_ranks
from tests.support.transports.delay import delayed
from tests.support.transports.late import late
from tests.support.zoo.unets import NETS, text

BOUNDS = {2: (0, 12, 16), 3: (0, 8, 12, 16), 4: (0, 4, 8, 12, 16)}
WARMUP = 1
STEPS = 4
TOLERANCE = 1e-9  # fp64, over all steps


def denoise(call: Any, x: Tensor, step: int) -> Tensor:
    """One step of a loop in which the image changes a little."""
    return x - 0.2 * call(x, 900 - 100 * step)


def simulated(model: nn.Module, policy: str, bounds: tuple[int, ...], **given: Any) -> list[Tensor]:
    images = [random_tensor((2, 4, bounds[-1], 6))]
    with torch.no_grad(), Simulation(policy, WARMUP, bounds) as one_device:
        for step in range(STEPS):
            one_device.begin_step()
            images.append(denoise(lambda x, t: model(x, t, **given).sample, images[-1], step))
    return images[1:]


def run_displaced(
    model: nn.Module, policy: str, bounds: tuple[int, ...], given: dict[str, Any], **options: Any
) -> list[Tensor]:
    own = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD, output="shard", fallback="error")
    x: Tensor = distpatch.shard(random_tensor((2, 4, bounds[-1], 6)), dist.group.WORLD, bounds=bounds)
    images = []
    with torch.no_grad(), distpatch.displaced(own, policy=policy, warmup_steps=WARMUP, **options):
        for step in range(STEPS):
            x = denoise(lambda x, t: own(x, t, **given).sample, x, step)
            images.append(distpatch.gather(x))
    return images


@pytest.mark.parametrize(("policy", "world"), [(p, w) for p in POLICIES for w in BOUNDS if p != "full_sync" or w == 3])
def test_simulation(policy: str, world: int) -> None:
    net = NETS["UNet2DCondition"]
    model, given = net.build(), {"encoder_hidden_states": text()}
    expected = simulated(model, policy, BOUNDS[world], **given)
    exact = simulated(model, "full_sync", BOUNDS[world], **given)
    # What is late, and read before it was waited for, is another step's.
    transports = {2: contextlib.nullcontext(), 3: delayed(0.001), 4: late(delay_s=0.001)}
    with transports[world]:
        ranks = run_ranks(world, lambda rank: run_displaced(model, policy, BOUNDS[world], given), keep=True)
    for images in ranks:
        for step, (image, right) in enumerate(zip(images, expected, strict=True)):
            torch.testing.assert_close(image, right, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m: f"step {step}: {m}")
    differs = float((expected[-1] - exact[-1]).abs().max())
    assert (differs < TOLERANCE) == (policy == "full_sync"), differs


@pytest.mark.parametrize("own_variance", [0.5, 0.01])
def test_corrected_statistics(own_variance: float) -> None:
    """By the moments E[x] and E[x²]; this rank's own variance where theirs would be negative."""
    means = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)
    variances, counts = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64), [4, 6, 2]
    new_mean, new_variance = torch.tensor(1.5, dtype=torch.float64), torch.tensor(own_variance, dtype=torch.float64)
    if own_variance < 0.1:  # all of the variance was this rank's, and it is gone
        means, variances = torch.zeros_like(means), torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64)
        new_mean = torch.zeros_like(new_mean)
    weight = torch.tensor(counts) / sum(counts)
    moments = torch.stack([means, variances + means.square()])
    mean, square = (moments * weight).sum(1) + torch.stack([new_mean, new_variance + new_mean**2]) - moments[:, 0]
    variance = square - mean**2
    assert (variance < 0) == (own_variance < 0.1)
    expected = new_variance if variance < 0 else variance

    last = torch.stack([means, variances.sqrt()], 1)
    own = torch.stack([new_mean, new_variance.sqrt()])
    got_mean, deviation = merge_deviations(*_corrected(counts, last, own, rank=0), 0.0)
    torch.testing.assert_close((got_mean, deviation.square()), (mean, expected))
