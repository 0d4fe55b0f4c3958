"""Every diffusion transformer of diffusers in a small config, on one device and converted on ranks that are threads."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models import transformers
from torch import Tensor, nn

import distpatch
from distpatch.torch_utils.tree import tensors_in
from tests.support.oracle import mesh_of
from tests.support.threads import run_ranks
from tests.support.zoo.autoencoder_runs import OwnProcess
from tests.support.zoo.image_transformers import IMAGES
from tests.support.zoo.token_transformers import TOKENS
from tests.support.zoo.transformer import Transformer
from tests.support.zoo.video_transformers import VIDEOS

# One embedding (B, C) has neither rows nor tokens; atoms of proteins.
NEITHER_IMAGES_NOR_TOKENS = {"PriorTransformer", "RFD4ProteinaTransformer"}
TRANSFORMERS: dict[str, Transformer] = {**IMAGES, **VIDEOS, **TOKENS}


def classes() -> Iterator[str]:
    for name, cls in vars(transformers).items():
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and name not in NEITHER_IMAGES_NOR_TOKENS:
            yield name


@dataclass
class Comparison:
    """``error``, ``gradient``: the largest difference of any rank over the largest value; ``gathered``: by function."""

    error: float = 0.0
    gradient: float = 0.0
    gathered: dict[str, int] = field(default_factory=dict)


def run(model: nn.Module, entry: Transformer, backward: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and where wanted gradients of the floating-point arguments and of the first and last parameter."""
    given = entry.arguments()
    wanted = [value for name, value in given.items() if "rotary" not in name] if backward else []
    leaves = [t for t in tensors_in(wanted) if t.is_floating_point() and t.ndim >= 2]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.set_grad_enabled(backward), OwnProcess(precise=entry.dtype == torch.float64):
        results = [t for t in tensors_in(model(**given)) if t.is_floating_point()]
        if not backward:
            return results, []
        weighed = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in results)
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(weighed, [*leaves, parameters[0], parameters[-1]], allow_unused=True)
    return [t.detach() for t in results], [torch.zeros(1) if g is None else g for g in gradients]


def compare(
    name: str, world: int, *, mesh: tuple[int, ...] = (), backward: bool = False, timeout: float = 60, **options: Any
) -> Comparison:
    """One call of a model, converted, on every rank against one device; ``backward``: with its gradients too.

    Without them the result is left sharded, and gathered here: one that is not would show that all ranks have computed
    the whole. On so many ranks, or on a mesh along height and width.
    """
    entry = TRANSFORMERS[name]
    model = entry.build()
    expected = run(copy.deepcopy(model), entry, backward)
    assert all(t.isfinite().all() and t.any() for t in expected[0]), f"{name}: results that show nothing"

    def body(rank: int) -> tuple[list[Tensor], list[Tensor], list[str]]:
        settings = {"fallback": "allow", "output": "gather" if backward else "shard", **entry.options, **options}
        if mesh:
            settings["dim"] = (-2, -1)
        converted = distpatch.convert_model(
            copy.deepcopy(model), mesh_of(mesh) if mesh else dist.group.WORLD, **settings
        )
        with distpatch.trace() as t:
            results, gradients = run(converted, entry, backward)
        assert backward or any(isinstance(result, distpatch.PatchTensor) for result in results), f"{name}: all is whole"
        return distpatch.gather(results), gradients, [record.op for record in t.fallbacks]

    result = Comparison()
    for results, gradients, gathered in run_ranks(world, body, timeout=timeout):
        result.error = max(result.error, largest_error(name, results, expected[0]))
        result.gradient = max(result.gradient, largest_error(name, gradients, expected[1]))
        result.gathered = {op: gathered.count(op) for op in gathered}
    return result


def largest_error(where: str, got: list[Tensor], wanted: list[Tensor]) -> float:
    assert len(got) == len(wanted), where
    worst = 0.0
    for value, right in zip(got, wanted, strict=True):
        assert type(value) is Tensor, f"{where}: a {type(value).__name__} was not gathered"
        assert (value.shape, value.dtype) == (right.shape, right.dtype), where
        assert value.isfinite().all(), where
        worst = max(worst, ((value - right).abs().max() / right.abs().max().clamp(min=1e-30)).item())
    return worst
