"""Whole pipelines of diffusers: converted, the same seed gives the same picture, with the same bits on every rank."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks
from tests.support.zoo.pipeline import Run
from tests.support.zoo.pipelines import PIPELINES, stable_diffusion, vae

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")]
TOLERANCE = 2e-5  # fp32, of values in [0, 1]
STABLE = PIPELINES["Stable Diffusion"]
ALONE = threading.Lock()  # loading a model, or adding an adapter, is nothing for two threads at once


def compare(
    run: Run,
    world: int = 2,
    *,
    before: Callable[[Any], object] = lambda pipe: None,
    after: Callable[[Any], object] = lambda pipe: None,
    fallback: str = "error",
    **call: Any,
) -> None:
    """``before`` and ``after`` the conversion something is done to the pipeline; on one device both."""
    pipe = run.build()
    alone = copy.deepcopy(pipe)
    before(alone)
    after(alone)
    expected = run(alone, **call)

    def body(rank: int) -> Tensor:
        own = copy.deepcopy(pipe)
        before(own)
        for name in run.converted:
            distpatch.convert_model(getattr(own, name), dist.group.WORLD, fallback=fallback)
        after(own)
        return run(own, **call)

    pictures = run_ranks(world, body)
    assert expected.isfinite().all() and expected.std() > 1e-3
    for picture in pictures:
        assert torch.equal(picture, pictures[0])
        assert picture.shape == expected.shape
        assert float((picture - expected).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name: str, world: int) -> None:
    compare(PIPELINES[name], world)


def test_vae_slicing() -> None:
    two = {key: torch.cat([value, value.flip(1)]) for key, value in STABLE.call.items() if "embeds" in key}
    compare(STABLE, after=lambda pipe: pipe.vae.enable_slicing(), **two)


def test_attention_slicing() -> None:
    """Slices are written into a plain tensor, which takes gathered values."""
    compare(STABLE, after=lambda pipe: pipe.enable_attention_slicing(1), fallback="allow")


def test_autocast() -> None:
    pipe = STABLE.build()

    def half(pipe: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return STABLE(pipe).float()

    exact, expected = STABLE(copy.deepcopy(pipe)), half(copy.deepcopy(pipe))

    def body(rank: int) -> Tensor:
        own = copy.deepcopy(pipe)
        for part in (own.unet, own.vae):
            distpatch.convert_model(part, dist.group.WORLD, fallback="error")
        return half(own)

    pictures = run_ranks(2, body)
    error = float((expected - exact).abs().mean())
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    assert 0 < float((pictures[0] - exact).abs().mean()) <= 1.5 * error


def add_lora(pipe: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    with ALONE:
        for part, names in ((pipe.unet, ["to_q", "to_k", "to_v", "conv1"]), (pipe.vae, ["conv2"])):
            inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=names), part)
            added = [parameter for name, parameter in part.named_parameters() if "lora" in name]
            assert added
            for seed, parameter in enumerate(added):
                parameter.data = 0.1 * random_tensor(tuple(parameter.shape), seed, parameter.dtype)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when: str) -> None:
    compare(STABLE, **{when: add_lora})


def test_fused_lora() -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    def fuse(pipe: Any) -> None:
        add_lora(pipe)
        for module in pipe.unet.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()

    compare(STABLE, after=fuse)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_accelerate(when: str) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Double(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (2 * args[0], *args[1:]), kwargs

    compare(STABLE, **{when: lambda pipe: add_hook_to_module(pipe.unet, Double())})


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    model = vae()
    z = random_tensor((1, 4, 7, 5), dtype=torch.float32)
    with torch.no_grad():
        expected = model.decode(z).sample

    def body(rank: int) -> Tensor:
        own = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD)
        own.save_pretrained(tmp_path / str(rank))
        with ALONE:
            loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path / str(rank))
        assert loaded.state_dict().keys() == model.state_dict().keys()
        distpatch.convert_model(loaded, dist.group.WORLD)
        with torch.no_grad():
            return loaded.decode(z).sample

    for picture in run_ranks(2, body):
        assert float((picture - expected).abs().max()) <= TOLERANCE


def test_a_whole_pipeline_saved(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    expected = STABLE(copy.deepcopy(pipe))

    def body(rank: int) -> Tensor:
        own = copy.deepcopy(pipe)
        for part in (own.unet, own.vae):
            distpatch.convert_model(part, dist.group.WORLD)
        own.save_pretrained(tmp_path / str(rank))
        parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
        with ALONE:
            loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / str(rank), **parts)
        distpatch.convert_model(loaded.vae, dist.group.WORLD)
        return STABLE(loaded)

    for picture in run_ranks(2, body):
        assert float((picture - expected).abs().max()) <= TOLERANCE


def test_latents_stay_sharded_into_the_decoder() -> None:
    """The U-Net's rows are handed to the decoder without a gather."""
    pipe = stable_diffusion()
    latents = random_tensor((1, 4, 10, 8), dtype=torch.float32)
    text = STABLE.call["prompt_embeds"]
    with torch.no_grad():
        expected = pipe.vae.decode(pipe.unet(latents, 3, text).sample).sample

    def body(rank: int) -> Tensor:
        own = copy.deepcopy(pipe)
        distpatch.convert_model(own.unet, dist.group.WORLD, output="shard")
        distpatch.convert_model(own.vae, dist.group.WORLD, output="shard")
        with torch.no_grad(), distpatch.trace() as t:
            latent_rows = own.unet(latents, 3, text).sample
            picture = own.vae.decode(latent_rows).sample
        assert not t.fallbacks and not t.count("gather") and not t.count("output")
        return distpatch.gather(picture)

    for picture in run_ranks(3, body):
        assert float((picture - expected).abs().max()) <= 10 * TOLERANCE
