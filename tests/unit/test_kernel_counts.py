"""Kernels, rounds and attention calls of a decoder on GPUs, counted on fake tensors: no more than these."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

import distpatch
from distpatch.planning import fake_run
from distpatch.rules.linalg import attention
from tests.support import forced
from tests.support.zoo.models import sd_decoder


@cache
def decoder() -> nn.Module:
    """Stable Diffusion's, of bfloat16, without data."""
    with torch.device("meta"):
        vae = sd_decoder()
        for parameter in vae.parameters():
            parameter.data = parameter.data.bfloat16()
    return vae


def attention_calls(plan: distpatch.Plan) -> int:
    (rank,) = plan.ranks
    return sum(times for kernel, times in rank.kernels.items() if "scaled_dot_product" in kernel.name)


def softmaxes(plan: distpatch.Plan) -> int:
    """Of attention computed step by step, which keeps the scores."""
    (rank,) = plan.ranks
    return sum(times for kernel, times in rank.kernels.items() if "softmax" in kernel.name)


@cache
def planned(size: int, ranks: int, device: str = "H100", fakes_are_on: str = "cpu") -> distpatch.Plan:
    latents = torch.empty(1, 4, size // 8, size // 8, device="meta", dtype=torch.bfloat16)
    options: dict[str, Any] = {"ranks": [min(1, ranks - 1)], "device": device}
    return distpatch.plan(decoder(), latents, method="decode", world_size=ranks, **options)


# (picture, ranks): launches and rounds at most. What makes them fewer is welcome to lower these.
MOST = {(512, 1): (330, 0), (512, 8): (460, 36), (4096, 1): (4700, 0), (4096, 8): (985, 36)}


@pytest.mark.skipif(forced.IS_ON, reason="of convolutions that are not cut into three")
@pytest.mark.parametrize(("size", "ranks"), MOST)
def test_a_decode(size: int, ranks: int) -> None:
    plan = planned(size, ranks)
    launches, rounds = MOST[size, ranks]
    assert plan.rules_of == "cuda"
    assert (attention_calls(plan), softmaxes(plan)) == (1, 0), "one head, and no kernel that keeps scores"
    assert 0 < plan.launches <= launches and plan.rounds <= rounds
    assert f"{plan.launches:,} kernels" in plan.table() and f"in {plan.rounds:,} rounds" in plan.table()
    assert plan.to_dict()["launches"] == plan.to_dict()["ranks"][0]["launches"] == plan.launches
    assert plan.to_dict()["rounds"] == sum(op.rounds for op in plan.ops()) == plan.rounds
    assert sum(op.launches for op in plan.ops()) == plan.launches


def test_where_scores_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub says that they are: then no more of them than ``SCORE_BYTES``, in many calls, as before."""
    monkeypatch.setattr(attention, "keeps_scores", lambda *args: True)
    assert attention_calls(planned.__wrapped__(4096, 8)) == 512**2 // 8 * 512**2 * 4 // attention.SCORE_BYTES == 64


class Attention(nn.Module):
    """Pixels as tokens of 16 heads of 64."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).contiguous().unflatten(-1, (16, 64)).transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


@pytest.mark.parametrize(("ranks", "groups"), [(1, 4), (4, 4)])
def test_one_call_a_group_of_heads(ranks: int, groups: int) -> None:
    """Keys and values of 1 GiB, of which 256 MiB are gathered at a time."""
    x = torch.empty(1, 1024, 512, 512, device="meta", dtype=torch.bfloat16)
    plan = distpatch.plan(Attention(), x, world_size=ranks, ranks=[0], options={"output": "shard"})
    assert attention_calls(plan) == groups and softmaxes(plan) == 0


def test_a_cpu_takes_its_own_sizes() -> None:
    """Of a cache: many more parts; and no scores are kept either."""
    cpu, gpu = planned(512, 8, device="cpu"), planned(512, 8)
    assert cpu.rules_of == "cpu" and cpu.launches > 2 * gpu.launches and attention_calls(cpu) == 1
    assert cpu.rounds == gpu.rounds


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake CUDA tensors are of a build with CUDA")
@pytest.mark.parametrize("size", [1024, 4096])
def test_fake_cuda_tensors_count_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan counts on CPU tensors is what the rules do with CUDA's, on a build that has them.

    But for a few copies: without a GPU torch has convolutions of fake CUDA tensors forget ``channels_last``, which
    cuDNN keeps, as fake CPU tensors do.
    """
    on_cpu = planned(size, 8)
    monkeypatch.setattr(fake_run, "FAKES_ARE_ON", "cuda")
    on_cuda = planned(size, 8, fakes_are_on="cuda")
    assert attention_calls(on_cuda) == 1 and on_cuda.ranks[0].trace.records == on_cpu.ranks[0].trace.records
    assert on_cuda.launches == pytest.approx(on_cpu.launches, rel=0.01) and on_cuda.flops == on_cpu.flops


class Asks(nn.Module):
    """Asks, in training alone, what tells of memory and is answered by tensors without data."""

    def __init__(self, asks: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.asks = nn.Conv2d(32, 32, 3, padding=1), asks

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.training:
            self.asks(y)
        return y


class Residual(nn.Module):
    """A block of diffusers, which asks."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ResnetBlock2D(in_channels=32, out_channels=32, temb_channels=None, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x, None)
        return y


TRAINING: dict[str, Callable[[], nn.Module]] = {
    "is_contiguous": lambda: Asks(lambda x: x.is_contiguous()),
    "is_contiguous, channels last": lambda: Asks(lambda x: x.is_contiguous(memory_format=torch.channels_last)),
    "contiguous": lambda: Asks(lambda x: x.contiguous()),
    "view": lambda: Asks(lambda x: x.view(1, 2, 16, 64, 64)),
    "stride": lambda: Asks(lambda x: x.stride()),
    "tensor_split": lambda: Asks(lambda x: x.tensor_split(3, -2)),
    "indices": lambda: Asks(lambda x: x[:, [0, 1]]),
    "residual": Residual,
}


@pytest.mark.parametrize("name", TRAINING)
def test_what_has_no_data_takes_no_memory(name: str) -> None:
    """Models left in ``train()`` are charged for what they keep, not for tensors that only have a shape."""
    x = torch.empty(1, 32, 64, 64, device="meta")
    with torch.device("meta"):
        model = TRAINING[name]()
    training, evaluated = (
        distpatch.plan(model.train(mode), x, world_size=4, device="cpu", options={"output": "shard"})
        for mode in (True, False)
    )
    assert training.peak_bytes <= 1.02 * evaluated.peak_bytes
    assert training.ranks[1].trace.records == evaluated.ranks[1].trace.records
