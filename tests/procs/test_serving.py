"""The plug-ins of serving systems, on two and three processes: what one device computes, and no tiles."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
import torch.distributed as dist
from torch import Tensor

from distpatch import DistPatchError, LayoutError
from distpatch.model.convert import is_converted
from distpatch.serving.calls import SWITCH, ShardedCalls, release
from tests.procs import servers
from tests.procs.pool import Pool
from tests.support.oracle import random_tensor
from tests.support.zoo.models import tiny_kl
from tests.support.zoo.video_autoencoders import VIDEOS

LATENTS = (1, 4, 7, 6)
CLIP = (1, 4, 3, 5, 2)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    """Processes of their own: what stands for the servers stays in them."""
    pool = Pool(3)
    yield pool
    pool.close()


def plugin(group: str) -> Any:
    """What the server finds under its entry-point group, in its process."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"][group]["distpatch"].partition(":")
    return getattr(importlib.import_module(module), name)


def omni(monkeypatch: pytest.MonkeyPatch, kind: str, like: Any, mode: str) -> Any:
    """An autoencoder of vLLM-Omni as its registry leaves it."""
    servers.vllm_omni()
    monkeypatch.setenv(SWITCH, "1")
    plugin("vllm_omni.general_plugins")()
    module = importlib.import_module(f"{servers.OMNI}.autoencoders.{kind}")
    (cls,) = (
        value
        for name, value in vars(module).items()
        if name in {"DistributedAutoencoderKL", "DistributedAutoencoderKLWan"}
    )
    vae = cls(**{name: value for name, value in like.config.items() if not name.startswith("_")})
    vae.double().eval().load_state_dict(like.state_dict())
    vae.init_distributed()
    vae.use_tiling = True
    vae.set_parallel_size(dist.get_world_size(), mode=mode)
    return vae


def same(found: Tensor, right: Tensor) -> None:
    assert type(found) is Tensor
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def pictures(rank: int, mode: str) -> None:
    plain, z = tiny_kl(), random_tensor(LATENTS)
    right = plain.decode(z).sample
    with pytest.MonkeyPatch.context() as monkeypatch:
        vae = omni(monkeypatch, "autoencoder_kl", plain, mode)
        assert vae.is_distributed_enabled() and not is_converted(vae)  # weights may still be loaded
        same(vae.decode(z, return_dict=False)[0], right)
        same(vae.encode(right).latent_dist.mean, plain.encode(right).latent_dist.mean)
        assert is_converted(vae) and vae.is_distributed_enabled() and vae.use_tiling
        assert vae.distributed_executor.parallel_size == dist.get_world_size()
        with pytest.raises(LayoutError):
            vae.decode()
        assert vae.use_tiling
        with pytest.raises(DistPatchError, match="converted already"):
            ShardedCalls(vae, lambda: dist.group.WORLD, -2, [])
        vae.set_parallel_size(dist.get_world_size(), mode="tile")  # and back
        assert not is_converted(vae) and "decode" not in vae.__dict__
        vae.set_parallel_size(1, mode=mode)
        assert "decode" not in vae.__dict__
        with pytest.raises(DistPatchError, match="set --vae-patch-parallel-size to"):
            vae.set_parallel_size(dist.get_world_size() + 1, mode=mode)


@pytest.mark.parametrize(("world", "mode"), [(2, "spatial_shard_height"), (3, "spatial_shard_width")])
def test_vllm_omni(ranks: Pool, world: int, mode: str) -> None:
    ranks.run(world, pictures, mode)


@torch.no_grad()
def clips(rank: int) -> None:
    plain, z = VIDEOS["AutoencoderKLWan"].build(), random_tensor(CLIP)
    right = plain.decode(z).sample
    with pytest.MonkeyPatch.context() as monkeypatch:
        vae = omni(monkeypatch, "autoencoder_kl_wan", plain, "spatial_shard_height")
        chunks: list[Tensor] = []
        vae.decode_with_chunks(z, on_chunk=chunks.append)
        assert [chunk.shape[2] for chunk in chunks] == ([1, 4, 4] if rank == 0 else [])
        if chunks:
            same(torch.cat(chunks, 2), right)
        seen = 0

        def fails(chunk: Tensor) -> None:
            nonlocal seen
            seen += 1
            if seen == 2:
                raise OSError("the file is full")

        try:
            vae.decode_with_chunks(z, on_chunk=fails)
        except OSError as error:
            assert rank == 0 and seen == 2 and str(error) == "the file is full"
        else:
            assert rank and not seen
        same(vae.decode(z).sample, right)
        sessions(vae, plain, z, right)


def sessions(vae: Any, plain: Any, z: Tensor, right: Tensor) -> None:
    """Two at once, as vLLM-Omni's ``SupportsStreamingDecode``; a rank keeps its rows of what one device keeps."""
    from distpatch.serving.vllm_omni import StreamingDecoder

    kept = []
    for decoder in (StreamingDecoder(plain), StreamingDecoder(vae, bytes_per_pixel_fp32=8.0)):
        one, two = decoder.new_decode_state("a"), decoder.new_decode_state("b")
        assert not one.started and one.nbytes() == 0
        found = []
        for chunk in z.split(1, 2):
            found.append(decoder.decode_chunk(chunk, one))
            decoder.decode_chunk(-chunk, two)
        same(torch.cat(found, 2), right)
        assert (one.frames_decoded, one.chunks_decoded) == (3, 3) and one.nbytes_by_device() == {"cpu": one.nbytes()}
        kept.append(one.nbytes())
        decoder.release(one)
        assert not one.started and one.nbytes() == 0
        same(decoder.decode_chunk(z, one), right)
    rows = z.shape[3]
    assert kept[1] <= kept[0] * -(-rows // dist.get_world_size()) / rows
    assert decoder.declared_state_bytes(height=9, width=2, dtype=torch.float16) == 5 * 2 * 4
    with pytest.raises(ValueError, match="session_id"):
        decoder.new_decode_state(" ")


def test_chunks_of_vllm_omni(ranks: Pool) -> None:
    ranks.run(2, clips)


@torch.no_grad()
def loaded(rank: int) -> None:
    servers.sglang()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(SWITCH, "1")
        plugin("sglang.multimodal_gen.plugins")()
    hooks = importlib.import_module(f"{servers.SGLANG}.runtime.platforms.plugins").HookRegistry
    hooks.apply_hooks()
    base = importlib.import_module(f"{servers.SGLANG}.configs.models.vaes.base")
    assert base.should_use_spatial_shard_parallel_decode(object()) is False
    load = importlib.import_module(servers.LOADER).VAELoader.load
    servers.decode_on(dist.group.WORLD)
    for model in servers.sglang_models():
        model.double().eval()
        model.use_tiling, z = False, random_tensor(CLIP)
        right = model.decode(z)
        model.use_tiling = True
        vae, _ = load(None, "", model, "vae", "diffusers")
        same(vae.decode(z), right)
        assert is_converted(vae) and vae.use_tiling
        frames: list[Tensor] = []
        same(vae.decode(z, on_frames=frames.append), right)
        same(torch.cat(frames, 2), right)
        release(vae)
        assert not is_converted(vae) and "decode" not in vae.__dict__
    servers.decode_on(dist.new_group([rank], use_local_synchronization=True))
    alone, _ = load(None, "", servers.SglangVAE().double(), "video_vae", "diffusers")
    with pytest.raises(AssertionError, match="tiles"):  # one rank decodes as the server has it
        alone.decode(random_tensor(CLIP))
    audio, _ = load(None, "", servers.SglangVAE(), "audio_vae", "diffusers")
    assert "decode" not in audio.__dict__


def test_sglang(ranks: Pool) -> None:
    ranks.run(2, loaded)


@pytest.mark.parametrize("group", ["vllm_omni.general_plugins", "sglang.multimodal_gen.plugins"])
@pytest.mark.parametrize("asked", ["", "0"])
def test_not_asked_for(monkeypatch: pytest.MonkeyPatch, group: str, asked: str) -> None:
    """Being installed beside a server changes nothing: of the server nothing is even imported."""
    server = group.partition(".")[0]
    monkeypatch.setitem(sys.modules, server, None)
    monkeypatch.setenv(SWITCH, asked)
    plugin(group)()
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(ModuleNotFoundError, match=server):
        plugin(group)()
