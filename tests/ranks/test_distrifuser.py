"""Next to MIT's DistriFusion: its own modules take the same steps, and its pipeline's latents are decoded on all ranks.

Its package wants CUDA, NCCL and a diffusers of 2023. What runs here are its modules and its U-Net, with a
configuration that is filled in by hand; not its ``DistriConfig()``, which asks for both, nor its pipeline classes,
which do not import with this diffusers: what they do around the U-Net is written out below.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks
from tests.support.zoo.pipelines import PIPELINES

utils = pytest.importorskip("distrifuser.utils", reason="pip install --no-deps distrifuser")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")]
WARMUP, STEPS, ROWS = 1, 5, 8
STABLE = PIPELINES["Stable Diffusion"]


def configuration(rank: int, world: int, mode: str) -> Any:
    config = object.__new__(utils.DistriConfig)
    given = {"mode": mode, "warmup_steps": WARMUP, "rank": rank, "world_size": world, "n_device_per_batch": world}
    fixed = {"split_batch": False, "do_classifier_free_guidance": True, "use_cuda_graph": False, "verbose": False}
    vars(config).update({**given, **fixed, "batch_group": None, "comm_checkpoint": 3, "device": torch.device("cpu")})
    return config


def theirs(module: Any, rows: Tensor, images: list[Tensor]) -> list[Tensor]:
    """Their module on this rank's rows, step by step."""
    module.distri_config.comm_checkpoint = 1  # else a lone module's rows are sent a step late
    manager = utils.PatchParallelismCommManager(module.distri_config)
    module.set_comm_manager(manager)
    first = images[0][..., rows, :]
    module(first)
    if manager.numel:
        manager.create_buffer()
    module(first)
    module.set_counter(0)
    results = [module(image[..., rows, :]) for image in images]
    manager.clear()
    return results


def ours(module: nn.Module, images: list[Tensor], mode: str) -> list[Tensor]:
    net = distpatch.convert_model(nn.Sequential(copy.deepcopy(module)), dist.group.WORLD, output="shard")
    with distpatch.displaced(net, policy=mode, warmup_steps=WARMUP, layers_per_message=1):
        return [net(image).local for image in images]


@pytest.mark.parametrize("mode", ["full_sync", "corrected_async_gn", "no_sync"])
def test_convolution(mode: str) -> None:
    from distrifuser.modules.pp.conv2d import DistriConv2dPP

    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    images = [random_tensor((2, 3, ROWS, 5), seed) for seed in range(STEPS)]

    def body(rank: int) -> None:
        lo, hi = rank * ROWS // 4, (rank + 1) * ROWS // 4
        with torch.no_grad():
            right = theirs(DistriConv2dPP(copy.deepcopy(conv), configuration(rank, 4, mode)), slice(lo, hi), images)
            for step, (a, b) in enumerate(zip(ours(conv, images, mode), right, strict=True)):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
                exact = torch.allclose(b, conv(images[step])[..., lo:hi, :])
                assert exact == (step <= WARMUP or mode == "full_sync")

    run_ranks(4, body)


def test_self_attention() -> None:
    from diffusers.models.attention import Attention
    from distrifuser.modules.pp.attn import DistriSelfAttentionPP

    attention = Attention(query_dim=8, heads=2, dim_head=4).double()
    images = [random_tensor((2, ROWS, 8), seed) for seed in range(STEPS)]

    class OfTokens(nn.Module):
        """An image whose rows are tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = copy.deepcopy(attention)

        def forward(self, image: Tensor) -> Tensor:
            return self.attention(image.squeeze(1)).unsqueeze(1)

    def body(rank: int) -> None:
        lo, hi = rank * ROWS // 2, (rank + 1) * ROWS // 2
        with torch.no_grad():
            config = configuration(rank, 2, "stale_gn")
            right = theirs(DistriSelfAttentionPP(copy.deepcopy(attention), config), slice(lo, hi), images)
            mine = ours(OfTokens(), [image.unsqueeze(1) for image in images], "stale_gn")
            for a, b in zip(mine, right, strict=True):
                torch.testing.assert_close(a.squeeze(1), b, rtol=1e-12, atol=1e-12)

    run_ranks(2, body)


def test_group_norm_far_from_zero() -> None:
    """At mean/std = 100 their E[x²] - E[x]² is off by more than 1e-3, merged moments by torch's own rounding."""
    from distrifuser.modules.pp.groupnorm import DistriGroupNorm

    norm = nn.GroupNorm(4, 8)
    images = [100 + random_tensor((1, 8, 64, 32), seed, torch.float32) for seed in range(WARMUP + 1)]
    exact = F.group_norm(images[-1].double(), 4)

    def body(rank: int) -> tuple[float, float]:
        lo, hi = rank * 32, rank * 32 + 32
        with torch.no_grad():
            config = configuration(rank, 2, "corrected_async_gn")
            right = theirs(DistriGroupNorm(copy.deepcopy(norm), config), slice(lo, hi), images)[-1]
            mine = ours(norm, images, "corrected_async_gn")[-1]
        return tuple(float((t - exact[..., lo:hi, :]).abs().max()) for t in (right, mine))

    torchs = float((norm(images[-1]).detach() - exact).abs().max())
    for their_error, error in run_ranks(2, body):
        assert their_error > 1e-3, their_error
        assert error < max(torchs, 2e-5), (error, torchs)


@pytest.mark.parametrize("mode", ["corrected_async_gn", "no_sync"])
def test_decode_after_their_pipeline(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``clear()``, then latents that are whole on every rank: decoded by a converted VAE as by a plain one."""
    import diffusers.models.unets.unet_2d_condition as moved_since

    monkeypatch.setitem(sys.modules, "diffusers.models.unet_2d_condition", moved_since)
    from distrifuser.models.distri_sdxl_unet_pp import DistriUNetPP

    built = STABLE.build()
    size = {"height": 4 * ROWS, "width": 16}  # the tiny VAE enlarges four times

    def body(rank: int) -> float:
        pipe = copy.deepcopy(built)
        config = configuration(rank, 2, mode)
        manager = utils.PatchParallelismCommManager(config)
        unet = DistriUNetPP(pipe.unet, config)
        unet.set_comm_manager(manager)
        with torch.no_grad():
            sample = random_tensor((2, 4, ROWS, 4), dtype=torch.float32)
            given = {
                "sample": sample,
                "timestep": 0,
                "encoder_hidden_states": STABLE.call["prompt_embeds"].repeat(2, 1, 1),
            }
            for prepare in (manager.create_buffer, manager.clear):  # as their pipeline's prepare()
                unet.set_counter(0)
                unet(**given, record=True)
                prepare()
            unet.set_counter(0)
            pipe.unet = unet
            latents = STABLE(pipe, **size, output_type="latent", num_inference_steps=STEPS)
            manager.clear()
            z = latents / pipe.vae.config.scaling_factor
            expected = pipe.vae.decode(z).sample
            distpatch.convert_model(pipe.vae, dist.group.WORLD, fallback="error")
            torch.testing.assert_close(pipe.vae.decode(z).sample, expected, rtol=1e-5, atol=1e-5)
            # Or in one call, with their last messages still under way behind the decoder:
            unet.set_counter(0)
            picture = STABLE(pipe, **size, num_inference_steps=STEPS)
            manager.clear()
            torch.testing.assert_close(picture, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
            # The row index of a rank in their U-Net:
            assert config.split_idx() == rank % config.n_device_per_batch
        return float(latents.sum())

    first, second = run_ranks(2, body)
    assert first == second
