"""Whole models: encode, decode, sample and train as on one device, at any height on any number of ranks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from skimage import data
from torch import Tensor, nn

import distpatch
from distpatch.torch_utils.tree import tensors_in
from tests.support import oracle
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import run_ranks
from tests.support.zoo.models import TAEF2, Taef2, on_ranks, tiny_autoencoder, tiny_kl

TOLERANCE = 1e-11
WORLDS = (1, 2, 3, 4, 8)
HEIGHTS = (64, 33, 31, 3, 2, 1)
MODELS: dict[str, Callable[[], Any]] = {
    "AutoencoderKL": tiny_kl,
    "AutoencoderKL without attention": lambda: tiny_kl(attention=False, channels=(8, 16)),
    "AutoencoderTiny": tiny_autoencoder,
}

Call = Callable[[Any, Tensor], Any]


def same_on_ranks(model: nn.Module, calls: dict[str, tuple[Call, Tensor]], world: int, **options: Any) -> None:
    """Each call gives, on every rank, the result of the unconverted model, and the bits of rank 0."""

    def run(model: nn.Module, rank: int = 0) -> dict[str, list[Tensor]]:
        with torch.no_grad():
            return {name: list(tensors_in(call(model, x))) for name, (call, x) in calls.items()}

    expected = run(model)
    results = run_ranks(world, on_ranks(model, run, **options))
    for name, wanted in expected.items():
        assert wanted, name
        for rank, result in enumerate(results):
            assert len(result[name]) == len(wanted)
            for value, right, first in zip(result[name], wanted, results[0][name], strict=True):
                assert_same(value, right, TOLERANCE, f"{name} on rank {rank} of {world}")
                assert torch.equal(value, first), f"{name}: other bits on rank {rank} of {world} than on rank 0"
        oracle.compared += 1


def decode(model: Any, z: Tensor) -> Any:
    return model.decode(z)


def encode(model: Any, x: Tensor) -> Any:
    return model.encode(x)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", MODELS)
def test_decode(name: str, world: int) -> None:
    calls = {f"decode of {h} rows": (decode, random_tensor((1, 4, h, 3))) for h in HEIGHTS}
    same_on_ranks(MODELS[name](), calls, world)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", MODELS)
def test_encode(name: str, world: int) -> None:
    heights = (512, 132, 101) if world < 8 else (132, 101)
    calls = {f"encode of {h} rows": (encode, random_tensor((1, 3, h, 16))) for h in heights}
    same_on_ranks(MODELS[name](), calls, world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sampled_posterior(world: int) -> None:
    """The posterior outside the model, and a seeded sample drawn inside it and outside."""

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    def posterior(model: Any, x: Tensor) -> list[Tensor]:
        latent = model.encode(x).latent_dist
        return [latent.mean, latent.std, latent.logvar, latent.mode(), latent.kl(), latent.sample(seeded())]

    x = random_tensor((2, 3, 40, 24))
    calls: dict[str, tuple[Call, Tensor]] = {
        "posterior": (posterior, x),
        "tuple": (lambda model, x: model.encode(x, return_dict=False)[0].mean, x),
        "forward": (lambda model, x: model(x), x),
        "forward, sampled": (lambda model, x: model(x, sample_posterior=True, generator=seeded()).sample, x),
        "there and back": (lambda model, x: model.decode(model.encode(x).latent_dist.mode()).sample, x),
    }
    same_on_ranks(tiny_kl(), calls, world)


@pytest.mark.parametrize(
    "options",
    [
        {"splits": 3},
        {"splits": 5, "sequential": False},
        {"splits": "auto"},
        {"dim": -1, "fallback": "allow"},  # tokens of pixels are rows first: gathered for columns
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    calls = {
        "decode": (decode, random_tensor((2, 4, 9, 7))),
        "encode": (encode, random_tensor((2, 3, 37, 41))),
    }
    same_on_ranks(tiny_kl(), calls, 3, **options)


def test_sharded_by_columns() -> None:
    calls = {"decode": (decode, random_tensor((2, 4, 5, 9))), "encode": (encode, random_tensor((1, 3, 8, 37)))}
    same_on_ranks(tiny_kl(attention=False), calls, 3, dim=-1)


def test_tiny_forward() -> None:
    """Through 8-bit latents; diffusers computes them in fp32 whatever the model's dtype."""
    x = random_tensor((1, 3, 27, 16), dtype=torch.float32)

    def run(model: Any, rank: int = 0) -> Tensor:
        with torch.no_grad():
            return model(x).sample

    model = tiny_autoencoder(torch.float32)
    for result in run_ranks(3, on_ranks(model, run)):
        assert_same(result, run(model), 1e-4, "image")


def test_patch_conv_on_one_device() -> None:
    """Without a group: the same model, its convolutions cut into patches of rows."""
    model, z = tiny_kl(), random_tensor((1, 4, 9, 6))
    with torch.no_grad():
        right = model.decode(z).sample
        for splits, sequential in ((4, True), (4, False), (1000, True)):
            distpatch.convert_model(model, splits=splits, sequential=sequential, fallback="error")
            assert_same(model.decode(z).sample, right, TOLERANCE, f"{splits} splits")
            distpatch.restore_model(model)


@pytest.mark.parametrize(("world", "splits"), [(1, 1), (2, 1), (3, 1), (3, 4), (4, 1), (8, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_backward(name: str, world: int, splits: int) -> None:
    """Gradients of the input and of every weight, on every rank, after an encode and a decode."""
    model, x = MODELS[name](), random_tensor((1, 3, 27, 16))

    def run(model: Any, rank: int = 0) -> dict[str, Tensor | None]:
        leaf = x.clone().requires_grad_()
        encoded = model.encode(leaf)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        image = model.decode(latents).sample
        (image * random_tensor(tuple(image.shape), seed=1)).sum().backward()
        return {"image": image.detach(), "x": leaf.grad, **{n: p.grad for n, p in model.named_parameters()}}

    expected = run(model)
    model.zero_grad()
    results = run_ranks(world, on_ranks(model, run, splits=splits))
    for key, right in expected.items():
        assert right is not None, key
        scale = max(right.abs().max().item(), 1.0)
        for rank, result in enumerate(results):
            value = result[key]
            assert value is not None, f"{key}: no gradient on rank {rank}"
            assert_same(value / scale, right / scale, TOLERANCE, f"{key} on rank {rank} of {world}")
            assert torch.equal(value, results[0][key]), f"{key}: other bits on rank {rank} than on rank 0"
    oracle.compared += 1


def test_training_steps() -> None:
    """Three steps of an optimiser on every rank keep the weights of the single device, and in step."""
    x = random_tensor((1, 3, 20, 16))

    def train(model: Any, rank: int = 0) -> Tensor:
        model.train()
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimiser.zero_grad()
            (model(x).sample - x).square().mean().backward()
            optimiser.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    model = tiny_kl(channels=(8, 16))
    results = run_ranks(3, on_ranks(model, train))
    right = train(model)
    for result in results:
        assert_same(result, right, 1e-8, "weights")
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", ["encode", "decode"])
def test_half_precision(call: str, dtype: torch.dtype) -> None:
    """Sharding costs no precision: the error against fp32 is the one of a single process."""
    model = tiny_kl(dtype=torch.float32)
    x = random_tensor((1, 4, 12, 12) if call == "decode" else (1, 3, 96, 96), dtype=torch.float32)

    def run(model: Any, rank: int = 0) -> Tensor:
        with torch.no_grad():
            x_ = x.to(next(model.parameters()).dtype)
            result = model.decode(x_).sample if call == "decode" else model.encode(x_).latent_dist.mean
        return result

    right = run(model)
    half = model.to(dtype)
    own_error = (run(half).float() - right).abs().mean()
    for result in run_ranks(3, on_ranks(half, run)):
        assert result.dtype == dtype
        assert (result.float() - right).abs().mean() <= 1.2 * own_error


def test_channels_last_is_kept() -> None:
    """In every convolution's input, on every rank; and in the result, which is the contiguous one's."""
    model, z = tiny_kl(dtype=torch.float32), random_tensor((1, 4, 12, 8), dtype=torch.float32)
    with torch.no_grad():
        right = model.decode(z).sample
    model.to(memory_format=torch.channels_last)

    def body(model: Any, rank: int) -> Tensor:
        seen: list[bool] = []

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            (x,) = args
            assert isinstance(x, distpatch.PatchTensor)
            seen.append(x.local.is_contiguous(memory_format=torch.channels_last))

        for module in model.decoder.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(look)
        with torch.no_grad():
            result = model.decode(z.contiguous(memory_format=torch.channels_last)).sample
        assert len(seen) > 10
        assert all(seen), seen
        return result

    for result in run_ranks(3, on_ranks(model, body)):
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert_same(result, right, 1e-5, "image")


@pytest.mark.skipif(not TAEF2.exists(), reason=f"the weights of TAEF2 are not in {TAEF2}")
def test_photograph_through_taef2() -> None:
    """A photograph through the real weights comes back, and as from a single process."""
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 255
    photo = F.interpolate(photo, size=(128, 96), mode="area")
    model = Taef2.pretrained()

    def run(model: Any, rank: int = 0) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            latents = model.encode(photo)
            return latents, model.decode(latents)

    latents, image = run(model)
    psnr = -10 * (image.clamp(0, 1) - photo).square().mean().log10()
    assert psnr > 22, "the model is not the one that was trained"
    for world in (2, 3):
        for sharded_latents, sharded_image in run_ranks(world, on_ranks(model, run)):
            assert_same(sharded_latents, latents, 1e-4, "latents")
            assert_same(sharded_image, image, 1e-4, "image")


def test_one_call_at_a_time_of_submodules() -> None:
    """A decoder alone is a model too."""
    model, z = tiny_kl(channels=(8, 16)).decoder, random_tensor((1, 4, 9, 5))
    same_on_ranks(model, {"forward": (lambda model, z: model(z), z)}, 3)


def test_groups_do_not_outlive_their_use() -> None:
    """Nothing that distpatch keeps holds a process group, with its sockets and threads."""
    model, z = tiny_kl(channels=(8, 16)), random_tensor((1, 4, 6, 5))

    def body(model: Any, rank: int) -> weakref.ref[dist.ProcessGroup]:
        model.decode(z).sample.sum().backward()
        return weakref.ref(dist.group.WORLD)

    groups = run_ranks(2, on_ranks(model, body))
    gc.collect()
    assert [group() for group in groups] == [None, None]
