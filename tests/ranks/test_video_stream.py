"""A clip decoded and encoded chunk by chunk: the whole clip, a memory that does not grow, clips that take turns."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
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
from tests.support.zoo.autoencoder import Autoencoder
from tests.support.zoo.video_autoencoders import VIDEOS

CHUNKS = int(os.environ.get("CHUNKS", "8"))  # of the test of memory
ROWS = 5  # of latents


@dataclass(frozen=True)
class Streamed:
    """``decoded``, ``encoded``: frames of the chunks of a clip. ``tolerance``: how far they may be off the whole, where a
    1x1 convolution of all frames at once, or a norm in fp32, rounds by their number in some kernels of torch."""

    net: Autoencoder
    decoded: list[int]
    encoded: list[int]
    tolerance: float = 0.0


def ltx(name: str, **changes: Any) -> Autoencoder:
    return replace(VIDEOS[name], config={**VIDEOS[name].config, **changes})


PLAIN = {"decoder_inject_noise": (False,) * 4, "timestep_conditioning": False}
CAUSAL = {"decoder_causal": True}
STREAMED = {
    "Wan": Streamed(VIDEOS["AutoencoderKLWan"], [2, 1, 3], [5, 4], 1e-15),
    "Wan 2.2": Streamed(VIDEOS["AutoencoderKLWan 2.2"], [1, 2], [1, 8], 1e-13),
    "Qwen-Image": Streamed(VIDEOS["AutoencoderKLQwenImage"], [2, 1], [1, 4], 1e-15),
    "CogVideoX": Streamed(VIDEOS["AutoencoderKLCogVideoX"], [3, 4], [9, 8]),
    "Mochi": Streamed(VIDEOS["AutoencoderKLMochi"], [1, 1], [], 1e-13),
    "LTX": Streamed(ltx("AutoencoderKLLTXVideo", **CAUSAL), [1, 2], [1, 8], 1e-6),
    "LTX 0.9.5": Streamed(ltx("AutoencoderKLLTXVideo 0.9.5", **CAUSAL, **PLAIN), [2, 1], [9, 8], 1e-6),
    "LTX-2": Streamed(VIDEOS["AutoencoderKLLTX2Video"], [1, 2], [1, 8], 1e-13),
}


def clip(net: Autoencoder, method: str, frames: int, seed: int = 0) -> Tensor:
    channels, _, columns = net.latent if method == "decode" else net.image
    rows = ROWS if method == "decode" else 2 * net.scale
    return random_tensor((1, channels, frames, rows, columns), seed=seed)


def result(call: Any, x: Tensor) -> Tensor:
    out = call(x)
    found: Tensor = out.sample if hasattr(out, "sample") else out.latent_dist.parameters
    return found


@pytest.mark.parametrize("method", ["decode", "encode"])
@pytest.mark.parametrize("name", STREAMED)
@torch.no_grad()
def test_chunks_are_the_whole(name: str, method: str) -> None:
    net, tolerance = STREAMED[name].net, STREAMED[name].tolerance
    sizes = STREAMED[name].decoded if method == "decode" else STREAMED[name].encoded
    model = net.build()
    if not sizes:
        with pytest.raises(DistPatchError, match="grows with the clip"):
            VideoStream(model).encode(clip(net, method, 7))
        return
    ours, other = clip(net, method, sum(sizes)), clip(net, method, sum(sizes), seed=1)
    right = result(getattr(model, method), ours)
    same = partial(torch.testing.assert_close, rtol=0, atol=tolerance)
    stream = getattr(VideoStream(model), method)
    same(torch.cat([result(stream, chunk) for chunk in ours.split(sizes, 2)], 2), right)

    def body(rank: int) -> None:
        with torch.no_grad():
            vae = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD, fallback="error")
            call = getattr(vae, method)
            whole = result(call, ours)
            torch.testing.assert_close(whole, right, rtol=1e-10, atol=max(tolerance, 1e-10))
            one, two = getattr(VideoStream(vae), method), getattr(VideoStream(vae), method)
            found: tuple[list[Tensor], list[Tensor]] = ([], [])
            found[0].append(result(one, ours.split(sizes, 2)[0]))
            found[1].append(result(two, other.split(sizes, 2)[0]))
            of_other = result(call, other)  # a whole call in between
            for chunk, another in list(zip(ours.split(sizes, 2), other.split(sizes, 2)))[1:]:
                found[0].append(result(one, chunk))
                found[1].append(result(two, another))
            same(torch.cat(found[0], 2), whole)
            same(torch.cat(found[1], 2), of_other)
            distpatch.restore_model(vae)
            with pytest.raises(DistPatchError, match="does not follow the first one"):
                one(ours[:, :, -sizes[-1] :])
            assert torch.equal(result(getattr(vae, method), ours), right)

    run_ranks(2, body)


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "decode") for name in STREAMED), ("Wan", "encode"), ("LTX-2", "encode")]
)
@torch.no_grad()
def test_memory_does_not_grow(name: str, method: str) -> None:
    """What is kept from chunk to chunk is a rank's share, and the same after many (``CHUNKS=500``)."""
    net = STREAMED[name].net
    model = net.build()
    size = STREAMED[name].encoded[1] if method == "encode" else 2 if name == "CogVideoX" else 1
    channels, _, columns = net.latent if method == "decode" else net.image
    chunk = random_tensor((1, channels, size, 8 * (1 if method == "decode" else net.scale), columns))

    def kept(vae: nn.Module) -> list[int]:
        stream, seen = VideoStream(vae), []
        with LivePeak() as live:
            for index in range(CHUNKS):
                getattr(stream, method)(chunk[:, :, :1] if method == "encode" and index == 0 else chunk)
                seen.append(live.live_bytes)
        return seen

    def body(rank: int) -> list[int]:
        with torch.no_grad():
            return kept(distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD))

    alone = kept(model)
    for seen in run_ranks(2, body):
        assert seen[3:] == [seen[3]] * (CHUNKS - 3) and alone[3:] == [alone[3]] * (CHUNKS - 3)
        assert 0 < seen[3] <= 0.6 * alone[3], (seen[3], alone[3])


def tiled(vae: Any) -> Any:
    vae.enable_tiling()
    return vae


@torch.no_grad()
def test_refused() -> None:
    net = STREAMED["Wan"].net
    vae, latents = net.build(), clip(net, "decode", 2)
    with pytest.raises(DistPatchError, match="Conv2d works on whole clips: it keeps no caches"):
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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("AutoencoderKLHunyuanVideo", "its group norms at all frames"),
        ("AutoencoderKLHunyuanVideo15", "attention looks at all earlier frames"),
        ("AutoencoderKLLTXVideo", "not causal: its frames depend on later ones"),
        ("AutoencoderKLLTXVideo 0.9.5", "it is not causal"),
        ("noise", "adds noise, which each call draws anew"),
    ],
)
@torch.no_grad()
def test_models_that_need_the_whole_clip(name: str, reason: str) -> None:
    net = VIDEOS[name] if name != "noise" else ltx("AutoencoderKLLTXVideo 0.9.5", **CAUSAL)
    with pytest.raises(DistPatchError, match=f"{net.cls}.* {reason}"):
        VideoStream(net.build()).decode(clip(net, "decode", 1))


@torch.no_grad()
def test_chunks_that_would_give_another_clip() -> None:
    """A model that groups frames is given its groups, whole; a decoder that can be causal has to be asked to be."""
    cog = STREAMED["CogVideoX"].net
    stream = VideoStream(cog.build())
    with pytest.raises(DistPatchError, match="the first chunk has 2 or more, later ones a multiple of 2; got 1"):
        stream.decode(clip(cog, "decode", 1))
    stream.decode(clip(cog, "decode", 3))
    with pytest.raises(DistPatchError, match="a multiple of 2; got 3"):
        stream.decode(clip(cog, "decode", 3))
    wan = STREAMED["Wan"].net
    with pytest.raises(DistPatchError, match=r"1 \+ 4 n in the first chunk, 4 n in later ones; got 4"):
        VideoStream(wan.build()).encode(clip(wan, "encode", 4))
    net = ltx("AutoencoderKLLTX2Video", decoder_causal=False)
    model, latents = net.build(), clip(net, "decode", 2)
    with pytest.raises(DistPatchError, match="it is not causal"):
        VideoStream(model).decode(latents)
    chunks = VideoStream(model).frames(latents.split(1, 2), causal=True)
    torch.testing.assert_close(torch.cat(list(chunks), 2), model.decode(latents, causal=True).sample)
