"""A pipeline of diffusers on all ranks: what it calls is converted, the pipeline itself is left alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distpatch.comm.communicator import Communicator, Group, communicator, group_of
from distpatch.diffusion.displaced import POLICIES, displaced
from distpatch.diffusion.guidance import check_mesh, on_all_ranks, split_guidance
from distpatch.model.convert import convert_model
from distpatch.model.restore import restore_model
from distpatch.tensor.patch_tensor import PatchTensor, gather
from distpatch.torch_utils.tree import map_tensors


class ParallelPipeline:
    """What ``parallelize_pipeline`` returns: called as the pipeline is, and with all its attributes.

    ``pipe``: the pipeline itself. ``steps``: of the last call, by name of the component, what ``displaced`` yields.
    """

    def __init__(self, pipe: Any, converted: Sequence[str], denoisers: Sequence[str], options: dict[str, Any] | None):
        own = {"pipe": pipe, "converted": tuple(converted), "denoisers": tuple(denoisers), "options": options}
        self.__dict__.update(own, steps={})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call; what it returns is gathered, on every rank."""
        steps = self.__dict__["steps"] = {}
        with torch.no_grad(), ExitStack() as contexts:
            for name in self.denoisers if self.options is not None else ():
                steps[name] = contexts.enter_context(displaced(getattr(self.pipe, name), **self.options))
            return gather(self.pipe(*args, **kwargs))

    def restore(self) -> Any:
        """The pipeline, as it was."""
        for name in self.converted:
            restore_model(getattr(self.pipe, name))
        return self.pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["pipe"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.pipe, name, value)

    def __repr__(self) -> str:
        return f"ParallelPipeline({type(self.pipe).__name__}, converted={self.converted}, displaced={self.options})"


def parallelize_pipeline(
    pipe: Any,
    mesh: Group = None,
    *,
    displaced: str | Mapping[str, Any] | None = None,
    vae: bool = True,
    denoisers: Sequence[str] = ("unet", "controlnet"),
    fallback: str = "warn",
) -> ParallelPipeline:
    """A pipeline of diffusers whose denoiser and autoencoder run on all ranks; every rank calls it.

    ``mesh``: a group or a 1-D mesh (default: all ranks), or one of ``guidance_mesh``, whose halves denoise with
    the prompt and without it; the autoencoder runs on all ranks either way. ``displaced``: the name of a policy,
    or the options of ``distpatch.displaced``; without it the picture is that of one device. ``denoisers``: the
    components that are called once a step, those of them that the pipeline has. Latents stay sharded from one step
    to the next and into the decoder: a callback that looks at them gets a PatchTensor.

    Each call begins with nothing left of an earlier one, and ends, in an exception too, with no message under way.
    All ranks must draw the same noise: pass generators of one seed. Returns a ``ParallelPipeline``; raises
    ``ValueError`` where the pipeline has none of the denoisers, and what ``convert_model`` raises.
    """
    options = {"policy": displaced} if isinstance(displaced, str) else displaced
    if options is not None and options.get("policy", "full_sync") not in POLICIES:
        raise ValueError(f"displaced: policy is one of {', '.join(POLICIES)}; got {options['policy']!r}")
    named = [name for name in denoisers if isinstance(getattr(pipe, name, None), nn.Module)]
    if not named:
        raise ValueError(f"{type(pipe).__name__} has none of the components {tuple(denoisers)}")
    mesh = mesh or dist.group.WORLD
    halves = mesh if isinstance(mesh, DeviceMesh) and mesh.ndim == 2 else None
    everyone = mesh
    if halves is not None:
        check_mesh(halves)
        ranks = sorted(halves.mesh.flatten().tolist())
        whole_world = len(ranks) == dist.get_world_size()
        everyone = dist.group.WORLD if whole_world else group_of(ranks)
    with ExitStack() as undo:
        for name in named:
            model = getattr(pipe, name)
            if halves is not None:
                split_guidance(model, halves, output="shard", fallback=fallback)
            else:
                convert_model(model, mesh, output="shard", fallback=fallback)
            undo.callback(restore_model, model)
        converted = list(named)
        if vae and isinstance(getattr(pipe, "vae", None), nn.Module):
            convert_model(pipe.vae, everyone, fallback=fallback)
            converted.append("vae")
            if halves is not None:
                _decode_on_all(pipe.vae, halves, communicator(everyone))
        undo.pop_all()
    return ParallelPipeline(pipe, converted, named, None if options is None else dict(options))


def _decode_on_all(vae: Any, halves: DeviceMesh, everyone: Communicator) -> None:
    """Latents come in the rows of one half of the ranks, and are decoded by both."""
    decode = vae.decode

    def moved(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, PatchTensor) or tensor.region.comm is everyone:
            return tensor
        rows = on_all_ranks(tensor, halves, everyone)
        return gather(tensor) if rows is None else rows

    @functools.wraps(decode)
    def decode_on_all(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors(moved, (args, kwargs))
        return decode(*args, **kwargs)

    vae.decode = decode_on_all
