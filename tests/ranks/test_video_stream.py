"""A clip decoded chunk by chunk: the frames of the whole clip, a memory that does not grow, clips that take turns."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from distpatch import DistPatchError, VideoStream
from distpatch.profiling.live_memory import LivePeak
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks
from tests.support.zoo.video_autoencoders import VIDEOS

# How far frames may be off: a 1x1 convolution of all latents at once rounds by their number in some kernels of torch.
STREAMED = {"AutoencoderKLWan": 0.0, "AutoencoderKLWan 2.2": 1e-13, "AutoencoderKLQwenImage": 0.0}
ROWS = 5


def clip(name: str, frames: int, seed: int = 0) -> Tensor:
    channels, _, columns = VIDEOS[name].latent
    return random_tensor((1, channels, frames, ROWS, columns), seed=seed)


def in_chunks(stream: VideoStream, latents: Tensor, sizes: list[int]) -> list[Tensor]:
    return [stream.decode(chunk).sample for chunk in latents.split(sizes, dim=2)]


@pytest.mark.parametrize("name", STREAMED)
@torch.no_grad()
def test_chunks_are_the_whole(name: str) -> None:
    model = VIDEOS[name].build()
    ours, other = clip(name, 6), clip(name, 6, seed=1)
    right = model.decode(ours).sample
    same = partial(torch.testing.assert_close, rtol=0, atol=STREAMED[name])
    same(torch.cat(in_chunks(VideoStream(model), ours, [2, 1, 3]), 2), right)

    def body(rank: int) -> None:
        with torch.no_grad():
            vae = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD, fallback="error")
            whole, of_other = vae.decode(ours).sample, vae.decode(other).sample
            torch.testing.assert_close(whole, right, rtol=1e-10, atol=1e-10)
            one, two = VideoStream(vae), VideoStream(vae)
            found: tuple[list[Tensor], list[Tensor]] = ([], [])
            for chunk, another in zip(ours.split(2, 2), other.split(2, 2)):
                found[0].append(one.decode(chunk).sample)
                same(vae.decode(ours[:, :, :1]).sample, whole[:, :, :1])  # a whole call in between
                found[1].append(two.decode(another).sample)
            same(torch.cat(found[0], 2), whole)
            same(torch.cat(found[1], 2), of_other)
            distpatch.restore_model(vae)
            with pytest.raises(DistPatchError, match="does not follow the first one"):
                one.decode(ours[:, :, :1])
            assert torch.equal(vae.decode(ours).sample, right)

    run_ranks(2, body)


@torch.no_grad()
def test_memory_does_not_grow() -> None:
    """What is kept from chunk to chunk is a rank's share, and the same after many."""
    model = VIDEOS["AutoencoderKLWan"].build()
    chunk = random_tensor((1, 4, 1, 8, 2))

    def kept(vae: nn.Module) -> list[int]:
        stream, seen = VideoStream(vae), []
        with LivePeak() as live:
            for _ in range(12):
                stream.decode(chunk)
                seen.append(live.live_bytes)
        return seen

    def body(rank: int) -> list[int]:
        with torch.no_grad():
            return kept(distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD))

    alone = kept(model)
    for seen in run_ranks(2, body):
        assert seen[3:] == [seen[3]] * 9 and alone[3:] == [alone[3]] * 9
        assert 0 < seen[3] <= 0.6 * alone[3]


def tiled(vae: Any) -> Any:
    vae.enable_tiling()
    return vae


@torch.no_grad()
def test_refused() -> None:
    name = "AutoencoderKLWan"
    vae, latents = VIDEOS[name].build(), clip(name, 2)
    with pytest.raises(DistPatchError, match="Conv2d keeps no caches"):
        VideoStream(nn.Conv2d(3, 3, 3))
    with pytest.raises(DistPatchError, match="disable_tiling"):
        VideoStream(tiled(copy.deepcopy(vae))).decode(latents)
    stream = VideoStream(vae)
    stream.decode(latents)
    with pytest.raises(DistPatchError, match=r"shape \(1, 4, 2, 4, 2\) does not follow"):
        stream.decode(latents[:, :, :, 1:])
    before = dict(vae.__dict__)
    with pytest.raises(RuntimeError):
        stream.decode(latents.float())
    assert vae.__dict__.keys() == before.keys() and not vae.decoder._forward_pre_hooks
    assert torch.equal(vae.decode(latents).sample, VideoStream(vae).decode(latents).sample)
