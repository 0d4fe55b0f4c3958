"""The nodes of ComfyUI against a stand-in of its interface (``comfy.py``): what one device computes, by other processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from distpatch import RankError, comfyui
from tests.procs.comfy import VAE, Descriptor


@pytest.fixture(autouse=True)
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two of one thread on this host's CPU, which end with the test."""
    start = comfyui.local_group
    monkeypatch.setattr(comfyui, "local_group", lambda size: start(size or 2, device="cpu", threads=1))
    yield
    comfyui.RANKS_OF_THIS_PROCESS.close()


def run(name: str, **inputs: object) -> object:
    """As ComfyUI does: inputs by the names that the node gives, and the first of its results."""
    node = comfyui.NODE_CLASS_MAPPINGS[name]
    given = node.INPUT_TYPES()
    assert given["required"].keys() <= inputs.keys() <= {*given["required"], *given["optional"]}
    with torch.inference_mode():
        return getattr(node(), node.FUNCTION)(**inputs)[0]


def close(found: object, expected: Tensor) -> None:
    assert isinstance(found, Tensor) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_nodes() -> None:
    assert comfyui.NODE_CLASS_MAPPINGS.keys() == comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys()
    vae, video, pictures = VAE(), VAE(dims=3), torch.rand(2, 13, 10, 3)
    latents = run("DistpatchVAEEncode", vae=vae, pixels=pictures)["samples"]
    close(latents, vae.encode(pictures))
    close(run("DistpatchVAEDecode", vae=vae, samples={"samples": latents}), vae.decode(latents))
    processes = comfyui.RANKS_OF_THIS_PROCESS.of(0)._processes
    clip = run("DistpatchVAEEncode", vae=video, pixels=pictures)["samples"]
    close(clip, video.encode(pictures))
    close(run("DistpatchVAEDecode", vae=video, samples={"samples": clip}, ranks=0), video.decode(clip)[0])
    upscaler = Descriptor()
    upscaled = torch.cat([upscaler(picture) for picture in pictures.movedim(-1, 1).split(1)]).movedim(1, -1)
    for _ in range(2):
        close(run("DistpatchUpscaleWithModel", upscale_model=upscaler, image=pictures), upscaled)
    assert comfyui.RANKS_OF_THIS_PROCESS.of(0)._sent == 3  # a model each, once
    assert comfyui.RANKS_OF_THIS_PROCESS.of(0)._processes is processes
    vae.first_stage_model.dies_on_rank = 1
    with pytest.raises(RankError, match=r"process of rank 1 of 2 \(pid \d+\) ended with signal SIGKILL"):
        run("DistpatchVAEDecode", vae=vae, samples={"samples": latents})
    vae.first_stage_model.dies_on_rank = None
    close(run("DistpatchVAEDecode", vae=vae, samples={"samples": latents}), vae.decode(latents))
    vae.first_stage_model = None
    with pytest.raises(RuntimeError, match="VAE is invalid"):
        run("DistpatchVAEDecode", vae=vae, samples={"samples": latents})
