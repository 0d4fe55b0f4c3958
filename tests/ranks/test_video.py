"""A video autoencoder: gradients, memory, latents that are sharded already, and a clip that nobody has whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from distpatch.profiling.live_memory import LivePeak
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import run_ranks, turned_group
from tests.support.zoo.models import on_ranks


def wan(dtype: torch.dtype = torch.float64, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, **sizes}
    return diffusers.AutoencoderKLWan(**small, temperal_downsample=[False, True, True]).to(dtype).eval()


def encode(model: Any, x: Tensor) -> Tensor:
    return model.encode(x).latent_dist.mode()


def decode(model: Any, z: Tensor) -> Tensor:
    return model.decode(z).sample


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("call,shape", [(encode, (1, 3, 5, 24, 16)), (decode, (1, 4, 2, 3, 2))])
def test_gradients(world: int, call: Any, shape: tuple[int, ...]) -> None:
    model = wan()

    def run(model: nn.Module, rank: int = 0) -> list[Tensor]:
        x = random_tensor(shape).requires_grad_()
        out = call(model, x)
        (out * random_tensor(tuple(out.shape), seed=1)).sum().backward()
        assert x.grad is not None
        named = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [out.detach(), x.grad, *named]

    expected = run(copy.deepcopy(model))
    assert len(expected) > 40
    for rank, got in enumerate(run_ranks(world, on_ranks(model, run))):
        for index, (value, right) in enumerate(zip(got, expected, strict=True)):
            scale = max(float(right.abs().max()), 1e-30)
            assert_same(value / scale, right / scale, 1e-9, f"tensor {index} of rank {rank} of {world}")


@pytest.mark.parametrize("bounds", [(0, 5, 10), (0, 9, 10), (0, 10, 10)])
def test_sharded_latents(bounds: tuple[int, int, int]) -> None:
    """Rows that are there already, in any bounds, are decoded where they are."""
    model, z = wan(), random_tensor((1, 4, 2, 10, 4))
    with torch.no_grad():
        expected = decode(model, z)

    def body(model: Any, rank: int) -> Tensor:
        own = z[..., bounds[rank] : bounds[rank + 1], :].clone()
        rows = distpatch.PatchTensor.from_local(own, dist.group.WORLD, bounds=bounds)
        assert rows.local.data_ptr() == own.data_ptr()
        with torch.no_grad(), distpatch.trace() as t:
            clip = decode(model, rows)
        assert not t.count("gather") and not t.count("output") and not t.fallbacks
        assert clip.row_layout.bounds == tuple(8 * b for b in bounds)
        return distpatch.gather(clip)

    for clip in run_ranks(2, on_ranks(model, body, output="shard")):
        assert_same(clip, expected, 1e-10, str(bounds))


@pytest.mark.parametrize("world,most", [(2, 0.55), (4, 0.31)])
def test_memory_of_a_rank(world: int, most: float, tmp_path: Path) -> None:
    """Nine frames, decoded and written: a rank has its share of the activations, and nobody the whole clip."""
    model, z = wan(torch.float32, base_dim=8), random_tensor((1, 4, 3, 16, 12), dtype=torch.float32)

    def write(model: Any, rank: int = 0) -> int:
        with torch.no_grad(), LivePeak() as live:
            distpatch.save_video(decode(model, z), tmp_path / "clip.mp4", value_range=(-1, 1))
        return live.peak_bytes

    alone = write(model)
    for peak_bytes in run_ranks(world, on_ranks(model, write, output="shard")):
        assert peak_bytes <= most * alone, f"{peak_bytes / alone:.3f} of one device"


class Remembers(nn.Module):
    """Joins each clip to the last frame of the one before, as causal convolutions with a cache do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, (2, 3, 3), padding=(0, 1, 1)).double()
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        joined = x if self.cache is None else torch.cat([self.cache, x], 2)
        self.cache = x[:, :, -1:].clone()
        return self.conv(joined)


def test_a_cache_from_another_layout() -> None:
    """Of other bounds: redistributed. Of another height, or another group: an error that says so, on every rank."""
    model, first, second = Remembers(), random_tensor((1, 2, 3, 8, 5)), random_tensor((1, 2, 2, 8, 5), seed=1)
    alone = copy.deepcopy(model)
    with torch.no_grad():
        alone(first)
        expected = alone(second)

    @torch.no_grad()
    def body(model: Any, rank: int) -> None:
        group = dist.group.WORLD
        model(distpatch.shard(first, group, bounds=(0, 7, 8)))
        assert_same(model(second), expected, 1e-12, "other bounds")
        with pytest.raises(RuntimeError, match=r"sizes of tensors must match, got \(1, 2, 2, 6, 5\)"):
            model(second[..., :6, :])
        turned = distpatch.shard(first, turned_group())
        model.cache = turned[:, :, -1:]
        with pytest.raises(distpatch.LayoutError, match="different groups"):
            model(second)
        model.cache = None
        model(first)
        assert_same(model(second), expected, 1e-12, "afterwards")

    run_ranks(2, on_ranks(model, body))
