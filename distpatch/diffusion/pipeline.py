"""A pipeline of diffusers on all ranks: what it calls is converted, the pipeline itself is left alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distpatch.comm.communicator import Group, communicator, group_of
from distpatch.diffusion.displaced import POLICIES, displaced
from distpatch.diffusion.guidance import check_mesh, on_all_ranks, split_guidance
from distpatch.layout.rows import RowLayout
from distpatch.model.convert import convert_model
from distpatch.model.restore import restore_model
from distpatch.rules.core.redistribution import redistribute
from distpatch.tensor.patch_tensor import PatchTensor, gather
from distpatch.torch_utils.tree import map_tensors

M = TypeVar("M", bound=nn.Module)

DENOISERS = ("unet", "transformer", "transformer_2", "controlnet")  # components that pipelines call once a step


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
    denoisers: Sequence[str] = DENOISERS,
    fallback: str = "warn",
) -> ParallelPipeline:
    """A pipeline of diffusers whose denoisers and autoencoder run on all ranks; every rank calls it.

    ``mesh``: a group or a 1-D mesh, or one of ``guidance_mesh``, whose halves denoise with the prompt and without it;
    the autoencoder runs on all ranks either way. None: the mesh that diffusers has made for a denoiser
    (``enable_parallelism``), else all ranks. A denoiser that diffusers runs in parallel is left to it. ``displaced``:
    the name of a policy, or the options of ``distpatch.displaced``; without it the picture is that of one device.
    ``denoisers``: the components that are called once a step, those of them that the pipeline has. Latents stay sharded
    from one step to the next and into the decoder, which takes them in rows: a callback that looks at them gets a
    PatchTensor.

    Each call begins with nothing left of an earlier one, and ends, in an exception too, with no message under way.
    All ranks must draw the same noise: pass generators of one seed. Returns a ``ParallelPipeline``; raises
    ``ValueError`` where the pipeline has none of the denoisers, or none that could run displaced, and what
    ``convert_model`` raises.
    """
    options = {"policy": displaced} if isinstance(displaced, str) else displaced
    if options is not None and options.get("policy", "full_sync") not in POLICIES:
        raise ValueError(f"displaced: policy is one of {', '.join(POLICIES)}; got {options['policy']!r}")
    found = {name: part for name in denoisers if isinstance(part := getattr(pipe, name, None), nn.Module)}
    if not found:
        raise ValueError(f"{type(pipe).__name__} has none of the components {tuple(denoisers)}")
    theirs = {name: mesh_of_diffusers(part) for name, part in found.items()}
    named = [name for name, own in theirs.items() if own is None]
    if options is not None and not named:
        raise ValueError(f"displaced: {', '.join(found)} of this pipeline is parallel by diffusers already")
    mesh = mesh or next((own for own in theirs.values() if own is not None), None) or dist.group.WORLD
    halves = mesh if isinstance(mesh, DeviceMesh) and mesh.ndim == 2 else None
    everyone = mesh if halves is None else _all_of(halves)
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
            _decode_in_rows(pipe.vae, halves, everyone)
        undo.pop_all()
    return ParallelPipeline(pipe, converted, named, None if options is None else dict(options))


@overload
def enable(what: M, mesh: Group = None, **options: Any) -> M: ...


@overload
def enable(what: Any, mesh: Group = None, **options: Any) -> ParallelPipeline: ...


def enable(what: Any, mesh: Group = None, **options: Any) -> Any:
    """``parallelize_pipeline`` of a pipeline, ``convert_model`` of a model: what is not parallel yet runs on all ranks.

    ``mesh``: a group or a mesh; None: the mesh that diffusers has made for one of the pipeline's denoisers
    (``enable_parallelism``), else all ranks. ``options``: those of ``parallelize_pipeline`` or of ``convert_model``.
    Returns the ``ParallelPipeline``, or the model. Raises ``ValueError`` for a model that diffusers runs in parallel.
    """
    if not isinstance(what, nn.Module):
        return parallelize_pipeline(what, mesh, **options)
    if mesh_of_diffusers(what) is not None:
        raise ValueError(f"enable: diffusers runs this {type(what).__name__} in parallel already")
    return convert_model(what, mesh or dist.group.WORLD, **options)


def mesh_of_diffusers(model: nn.Module) -> DeviceMesh | None:
    """The ranks among which diffusers has shared out a model's tokens or weights; None where it has not."""
    config = getattr(model, "_parallel_config", None)
    tokens = getattr(config, "context_parallel_config", None)
    weights = getattr(config, "tensor_parallel_config", None)
    found: DeviceMesh | None = getattr(tokens, "_flattened_mesh", None) or getattr(weights, "_mesh", None)
    return found


def _all_of(halves: DeviceMesh) -> Group:
    check_mesh(halves)
    ranks = sorted(halves.mesh.flatten().tolist())
    return dist.group.WORLD if len(ranks) == dist.get_world_size() else group_of(ranks)


def _decode_in_rows(vae: Any, halves: DeviceMesh | None, group: Group) -> None:
    """Latents come in the rows of one half of the ranks, or sharded along frames; all ranks decode them, in rows."""
    decode, everyone = vae.decode, communicator(group)

    def moved(tensor: Tensor) -> Tensor:
        if isinstance(tensor, PatchTensor) and halves is not None and tensor.region.comm is not everyone:
            rows = on_all_ranks(tensor, halves, everyone)
            tensor = gather(tensor) if rows is None else rows
        if not isinstance(tensor, PatchTensor) or tensor.row_layout.dim == tensor.ndim - 2:
            return tensor
        return redistribute(tensor, RowLayout(tensor.ndim - 2, tensor.region.bounds(tensor.shape[-2])), vae.decode)

    @functools.wraps(decode)
    def decode_in_rows(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors(moved, (args, kwargs))
        return decode(*args, **kwargs)

    vae.decode = decode_in_rows
