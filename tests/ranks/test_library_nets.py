"""Nets that nobody here wrote run sharded as they are, forward and backward; what they gather is printed."""

from __future__ import annotations

import copy
import math
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

import distpatch
from distpatch.torch_utils.tree import tensors_in
from tests.support import oracle
from tests.support.mesh_cases import everything
from tests.support.oracle import mesh_of, random_tensor
from tests.support.threads import run_ranks
from tests.support.zoo.nets import UNETS, Net
from tests.support.zoo.transformer_nets import TRANSFORMERS

TOLERANCE = 1e-10  # of the largest value of the tensor, or of a thousandth of the largest of all gradients
WORLDS = (2, 3, 4)
HEADER = f"{'net':40} {'library':14} {'input':20} {'worlds':10} fallbacks of a forward pass"


class InDouble(TorchFunctionMode):
    """What a net computes in fp32, whatever its dtype, is computed in fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        elif func is torch.Tensor.to:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {k: torch.float64 if arg is torch.float32 else arg for k, arg in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def run(model: Any, net: Net, inputs: list[Tensor]) -> tuple[dict[str, Tensor | None], Counter[str]]:
    """Outputs, gradients of inputs and parameters, and buffers, by name; and what was gathered, how often."""
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    with InDouble() if net.double else nullcontext():
        with distpatch.trace() as t:
            outputs = list(tensors_in(net.call(model, *leaves)))
        sum((out * random_tensor(tuple(out.shape), seed=i)).sum() for i, out in enumerate(outputs)).backward()
    values: dict[str, Tensor | None] = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    values |= {f"gradient of input {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.is_floating_point()}
    values |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    values |= dict(model.named_buffers())
    return values, Counter({op: sum(f.count for f in t.fallbacks if f.op == op) for op in {f.op for f in t.fallbacks}})


def built(net: Net) -> torch.nn.Module:
    """Weights that are all in use: what a library sets to zero or one is moved a little."""
    torch.manual_seed(0)
    model = net.build().double().train(net.train)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)
    return model


def same_on_ranks(name: str, net: Net, mesh: tuple[int, ...] = ()) -> None:
    """On so many ranks, or on a mesh along height and width."""
    model = built(net)
    inputs = [random_tensor(x, seed=i) if isinstance(x, tuple) else x for i, x in enumerate(net.inputs)]
    right, _ = run(copy.deepcopy(model), net, inputs)
    largest = max(value.abs().max().item() for key, value in right.items() if key[0] == "g" and value is not None)

    def body(rank: int) -> Any:
        group, dim = (mesh_of(mesh), (-2, -1)) if mesh else (dist.group.WORLD, net.dim)
        own = distpatch.convert_model(copy.deepcopy(model), group, dim=dim, fallback="allow")
        return run(own, net, inputs)

    for world in (math.prod(mesh),) if mesh else WORLDS:
        results = run_ranks(world, body, keep=True)
        for rank, (values, gathered) in enumerate(results):
            for key, value in right.items():
                where = f"{key} on rank {rank} of {world}"
                got, first = values[key], results[0][0][key]
                assert (got is None) == (value is None), f"{where}: {got} for {value}"
                if got is None or value is None or first is None:
                    continue
                bound = TOLERANCE * max(value.abs().max().item(), 1e-3 * largest) if value.is_floating_point() else 0
                error = (got - value).abs().max().item()
                assert error <= bound, f"{where}: {error:.1e} off, more than {bound:.1e}"
                assert torch.equal(got, first), f"{where}: other bits than on rank 0"
            assert set(gathered) == set(net.fallbacks), f"gathered on rank {rank} of {world}: {gathered}"
        oracle.compared += 1
    counts = ", ".join(f"{op} ({count})" for op, count in gathered.items()) or "0"
    size, worlds = "x".join(map(str, inputs[0].shape)), "x".join(map(str, mesh)) or ", ".join(map(str, WORLDS))
    oracle.notes.setdefault(HEADER, []).append(f"{name:40} {net.library:14} {size:20} {worlds:10} {counts}")


@pytest.mark.skipif(not everything.on, reason="nets on meshes run with --meshes")
@pytest.mark.parametrize("name", {**UNETS, **TRANSFORMERS})
def test_on_a_mesh(name: str) -> None:
    same_on_ranks(name, {**UNETS, **TRANSFORMERS}[name], (2, 2))


@pytest.mark.parametrize("name", UNETS)
def test_unets_gather_nothing(name: str) -> None:
    assert not UNETS[name].fallbacks
    same_on_ranks(name, UNETS[name])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    same_on_ranks(name, TRANSFORMERS[name])
