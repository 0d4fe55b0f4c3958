"""Activations stand in memory as on one device, and so random numbers are those of one device.

Every module's output is compared: its dims' order in memory, and, at the end, the values, which depend on noise and
dropout. Without the right order they are other numbers, not other rounding.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import distpatch
from distpatch.torch_utils.memory_format import order_by
from distpatch.torch_utils.tree import tensors_in
from tests.support import oracle
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks
from tests.support.zoo.models import tiny_kl

LOCK = threading.Lock()  # thread-ranks share the default generator
DRAWS = {F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.gumbel_softmax, torch.randn_like, torch.rand_like}
DRAWS |= {torch.bernoulli, torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.bernoulli_, torch.normal}


class OwnGenerator(TorchFunctionMode):
    """As if a process drew from its default generator: every call its own numbers, the same on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in DRAWS:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        with LOCK:
            torch.manual_seed(self.calls)
            return func(*args, **(kwargs or {}))


class Attention(nn.Module):
    """Tokens made of pixels and back, by a transposition: the result is channels-last, of a contiguous image too."""

    def __init__(self, channels: int, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.to_qkv, self.heads, self.dropout = nn.Linear(channels, 3 * channels), heads, dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x.flatten(2).transpose(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return out.transpose(1, 2).reshape(x.shape)


class Noise(nn.Module):
    """Numbers drawn in an image's own order, in several ways."""

    def forward(self, x: Tensor) -> Tensor:
        like = x.detach()
        drawn = torch.randn_like(like) + torch.empty_like(like).normal_() + torch.rand_like(like)
        drawn = drawn + torch.bernoulli(like.sigmoid()) + torch.zeros_like(like).bernoulli_(0.3)
        return F.alpha_dropout(x, 0.2, True) + F.dropout(x, 0.3, True) + 0.3 * drawn


class Then(nn.Module):
    def __init__(self, *layers: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.layers, self.residual = nn.ModuleList(layers), residual

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + x if self.residual and isinstance(layer, Attention) else layer(x)
        return x


def unet() -> nn.Module:
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        dropout=0.3,
    )


def images(layer: Callable[..., nn.Module] = nn.Conv2d, **options: Any) -> nn.Module:
    """Attention first, then a convolution of what it leaves."""
    return Then(
        Attention(4), layer(4, 4, 3, padding=1, **options), nn.GroupNorm(2, 4), nn.SiLU(), Noise(), nn.Conv2d(4, 4, 1)
    )


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    worlds: tuple[int, ...] = (2, 3)
    channels_last: bool = False
    call: Callable[[Any, Tensor], Any] = lambda model, x: model(x)
    grads: tuple[bool, ...] = (True, False)
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, Any], ...] = ()


def sampled(model: Any, x: Tensor) -> Any:
    return model(x, sample_posterior=True, generator=torch.Generator().manual_seed(3))


def autocast(model: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)


def vae() -> nn.Module:
    return tiny_kl(dtype=torch.float32)


CASES = {
    "SD-VAE": Case(vae, (1, 3, 32, 16), (2,), call=sampled),
    "SD-VAE, shards of one row and none": Case(vae, (1, 3, 16, 24), (3,), call=sampled, grads=(True,)),
    "SD-VAE, uneven rows, a batch": Case(vae, (2, 3, 40, 24), (3,), call=sampled, grads=(True,)),
    "SD-VAE, channels_last": Case(vae, (1, 3, 24, 24), (3,), True, sampled, grads=(True,)),
    "U-Net with dropout": Case(unet, (2, 3, 12, 8), (2,), call=lambda model, x: model(x, 5)),
    "U-Net with dropout, batch of one, few rows": Case(unet, (1, 3, 6, 8), (3,), call=lambda model, x: model(x, 5), grads=(True,)),
    "U-Net with dropout, channels_last": Case(unet, (1, 3, 8, 8), (2,), True, lambda model, x: model(x, 5), grads=(False,)),
    "pools of a batch of one, channels_last": Case(
        lambda: Then(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), Noise()), (1, 3, 12, 6), (2,), True
    ),
    "attention, then a convolution": Case(images, (2, 4, 7, 6)),
    "attention, then a convolution, batch of one": Case(images, (1, 4, 7, 6)),
    "attention, then a larger map than a rank's": Case(images, (1, 4, 90, 60), (2,)),
    "attention, then a depthwise convolution": Case(lambda: images(groups=4), (2, 4, 5, 6), (3,)),
    "attention, then a transposed convolution": Case(lambda: images(nn.ConvTranspose2d, stride=2), (2, 4, 6, 5), (2,)),
    "attention and its residual": Case(lambda: Then(nn.Conv2d(4, 4, 3, padding=1), Attention(4), nn.Conv2d(4, 4, 3, 2, 1), Noise(), residual=True), (2, 4, 9, 6)),
    "more ranks than rows": Case(images, (2, 4, 2, 6), (3,)),
    "in autocast": Case(images, (2, 4, 7, 6), (2,), call=autocast, dtype=torch.bfloat16),
    "in three patches": Case(images, (2, 4, 9, 6), (2,), grads=(False,), options=(("splits", 3),)),
    "a clip, channels_last_3d, another kernel than a rank's": Case(
        lambda: Then(nn.Conv3d(4, 4, 3, padding=1), Noise(), nn.Conv3d(4, 4, 1), Noise()), (1, 4, 3, 60, 40), (2,), True
    ),
    "a clip": Case(lambda: Then(nn.Conv3d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), Attention(4), nn.Conv3d(4, 4, 3, padding=1), Noise()), (2, 2, 2, 5, 4), (3,)),
}  # fmt: skip

Seen = list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def watched(model: nn.Module, seen: Seen) -> nn.Module:
    """Note of every module's outputs the shape, and the order in memory of the dims that are no single ones."""
    for name, module in model.named_modules():

        def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            for tensor in tensors_in(output):
                shape = tuple(tensor.shape)
                order = tuple(d for d in order_by(shape, tensor.stride()) if shape[d] > 1)
                seen.append((f"{type(module).__name__} {name}", shape, order))

        module.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("name", CASES)
def test_memory_order(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, x = case.model().train(), random_tensor(case.shape, dtype=torch.float32)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if case.channels_last and last is not None:
        model, x = model.to(memory_format=last), x.contiguous(memory_format=last)
    for grad in case.grads:

        def run(model: nn.Module, grad: bool = grad) -> list[Tensor]:
            with OwnGenerator(), torch.set_grad_enabled(grad):
                return [t.detach().float() for t in tensors_in(case.call(model, x))]

        wanted: Seen = []
        right = run(watched(copy.deepcopy(model), wanted))
        for world in case.worlds:

            def body(rank: int) -> tuple[list[Tensor], Seen]:
                seen: Seen = []
                converted = distpatch.convert_model(
                    watched(copy.deepcopy(model), seen), dist.group.WORLD, fallback="error", **dict(case.options)
                )
                return run(converted), seen

            for values, seen in run_ranks(world, body, timeout=60):
                others = [(mine, theirs) for mine, theirs in zip(seen, wanted, strict=True) if mine != theirs]
                assert not others, f"{len(others)} of {len(wanted)}, the first: {others[0]}"
                for value, expected in zip(values, right, strict=True):
                    tolerance = 0.1 if case.dtype == torch.bfloat16 else 1e-4
                    assert (value - expected).abs().max() <= tolerance * expected.abs().max()
            oracle.compared += 1


def transformer() -> nn.Module:
    """Tokens of pixels through a block with its norms and MLP, and an image again."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
            self.attention = Attention(4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x)
            tokens = x.flatten(2).transpose(1, 2)
            return (tokens + self.mlp(self.norm(tokens))).transpose(1, 2).unflatten(2, x.shape[-2:])

    return Then(nn.Conv2d(4, 4, 3, padding=1), Block(), nn.Conv2d(4, 4, 3, padding=1), Block(), nn.SiLU())


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many channels it takes
    "VAE": (vae, 3),
    "attention, convolution, norm": (lambda: Then(Attention(4), nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU()), 4),
    "attention, strided and transposed": (lambda: Then(nn.Conv2d(4, 4, 3, 2, 1), Attention(4), nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.ReLU()), 4),
    "residuals of attention, a pool": (lambda: Then(nn.Conv2d(4, 4, 3, padding=1), Attention(4), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), residual=True), 4),
    "transformer": (transformer, 4),
}  # fmt: skip


def drawing(model: nn.Module, draws: list[Tensor]) -> nn.Module:
    """Draw numbers for every activation of the model, in each of torch's ways."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            ones = torch.ones_like(output.detach())
            ways = torch.randn_like(output), torch.rand_like(output), F.dropout(ones, 0.4), torch.bernoulli(ones * 0.4)
            draws.extend(distpatch.gather(way).detach() for way in ways)

    for module in model.modules():
        if not any(module.children()):
            module.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("size", [(12, 8), (72, 64)], ids=["small", "large"])
@pytest.mark.parametrize("net", NETS)
def test_random_numbers_are_those_of_one_device(net: str, size: tuple[int, int], grad: bool) -> None:
    make, channels = NETS[net]
    torch.manual_seed(0)
    model, x = make(), random_tensor((1, channels, *size), dtype=torch.float32)

    def run(model: nn.Module) -> None:
        with OwnGenerator(), torch.set_grad_enabled(grad):
            model(x)

    wanted: list[Tensor] = []
    run(drawing(copy.deepcopy(model), wanted))

    def body(rank: int) -> list[Tensor]:
        draws: list[Tensor] = []
        run(distpatch.convert_model(drawing(copy.deepcopy(model), draws), dist.group.WORLD, fallback="error"))
        return draws

    for draws in run_ranks(3, body, timeout=60):
        assert len(draws) == len(wanted)
        for drawn, expected in zip(draws, wanted):
            assert torch.equal(drawn, expected)
