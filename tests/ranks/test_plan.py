"""A plan says what a real run then does: bytes and messages to the byte, FLOPs, and the peak of live activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import nn

import distpatch
from tests.oracle import random_tensor
from tests.threads import run_ranks
from tests.unets import CONDITIONED, DOWN, UP


@dataclass(frozen=True)
class Subject:
    """A model and the arguments of one call; ``method`` None is the model itself."""

    build: Callable[[], nn.Module]
    args: tuple[Any, ...]
    method: str | None = None


def sd_decoder() -> nn.Module:
    """Stable Diffusion's decoder in its real size."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    vae.encoder = vae.quant_conv = None
    return vae.eval()


def wan() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(base_dim=16, z_dim=4, num_res_blocks=1).eval()


def unet() -> nn.Module:
    torch.manual_seed(0)
    config = {**CONDITIONED, "block_out_channels": (32, 64)}
    return diffusers.UNet2DConditionModel(**config, down_block_types=DOWN, up_block_types=UP).eval()


def image(*shape: int) -> torch.Tensor:
    return random_tensor(shape, dtype=torch.float32)


SUBJECTS = {
    "sd": Subject(sd_decoder, (image(1, 4, 13, 16),), "decode"),
    "wan": Subject(wan, (image(1, 4, 2, 9, 8),), "decode"),
    "unet": Subject(unet, (image(2, 4, 26, 24), 3, image(2, 5, 12))),
}


def called(model: nn.Module, subject: Subject) -> Any:
    return (model if subject.method is None else getattr(model, subject.method))(*subject.args)


@pytest.mark.parametrize("name", SUBJECTS)
def test_plan_and_trace_agree(name: str) -> None:
    subject = SUBJECTS[name]
    model = subject.build()
    for world in (2, 3, 4):
        plan = distpatch.plan(model, *subject.args, world_size=world, method=subject.method, device="cpu")

        def body(rank: int) -> distpatch.Trace:
            converted = copy.copy(model)  # its own entry points, the same weights
            converted.__dict__ = dict(model.__dict__)
            distpatch.convert_model(converted, dist.group.WORLD, fallback="error")
            called(converted, subject) if rank < 0 else None
            with torch.no_grad(), distpatch.trace(measure=True) as t:
                called(converted, subject)
            return t

        traces = run_ranks(world, body)
        assert [rank.rank for rank in plan.ranks] == list(range(world))
        for planned, real in zip(plan.ranks, traces, strict=True):
            where = f"{name}, rank {planned.rank} of {world}"
            print(where, planned.peak_bytes / real.peak_bytes - 1, planned.flops / real.flops - 1)
            assert planned.trace.records == real.records, where
            assert (planned.sent_bytes, planned.messages) == (real.sent_bytes, real.messages), where
            assert planned.flops == pytest.approx(real.flops, rel=0.01), where
            assert planned.peak_bytes == pytest.approx(real.peak_bytes, rel=0.05), where
            assert real.peak_bytes and real.flops
