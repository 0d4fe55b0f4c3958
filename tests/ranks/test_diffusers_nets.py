"""U-Nets, ControlNets and adapters of diffusers: forward and backward as on one device, nothing gathered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distpatch.torch_utils.tree import tensors_in
from tests.support import oracle
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import run_ranks
from tests.support.zoo.models import on_ranks
from tests.support.zoo.unets import NETS, Net

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
TOLERANCE = 1e-9  # of the largest value


def run(model: nn.Module, inputs: dict[str, Any], training: bool) -> dict[str, list[Tensor]]:
    """Outputs, and with ``training`` the gradients of the image and of the parameters."""
    images = {name: x.clone().requires_grad_(training) for name, x in inputs.items() if is_image(x)}
    with torch.set_grad_enabled(training):
        outputs = [t for t in tensors_in(model(**{**inputs, **images})) if t.is_floating_point()]
    if not training:
        return {"outputs": outputs}
    for t in (*model.parameters(), *images.values()):
        t.grad = None
    sum((out * random_tensor(tuple(out.shape), seed=5)).sum() for out in outputs).backward()
    grads = [t.grad for t in (*images.values(), *model.parameters()) if t.grad is not None]
    return {"outputs": [out.detach() for out in outputs], "gradients": grads}


def is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim >= 4


def compare(net: Net, world: int, training: bool, heights: tuple[int, ...]) -> None:
    model = net.build()
    given = {rows: net.inputs(rows) for rows in heights}
    expected = {rows: run(model, inputs, training) for rows, inputs in given.items()}
    model.zero_grad()
    results = run_ranks(
        world, on_ranks(model, lambda m, _: {rows: run(m, inputs, training) for rows, inputs in given.items()})
    )
    for rows, parts in expected.items():
        for part, wanted in parts.items():
            scale = max(float(t.abs().max()) for t in wanted)
            for rank, result in enumerate(results):
                got = result[rows][part]
                assert len(got) == len(wanted)
                for index, (value, right, first) in enumerate(zip(got, wanted, results[0][rows][part], strict=True)):
                    label = f"{part}[{index}], {rows} rows, rank {rank} of {world}"
                    assert_same(value / scale, right / scale, TOLERANCE, label)
                    assert torch.equal(value, first), f"{label}: other bits than on rank 0"
        oracle.compared += 1


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", NETS)
def test_forward(name: str, world: int) -> None:
    compare(NETS[name], world, False, NETS[name].rows)


@pytest.mark.parametrize("name", NETS)
def test_backward(name: str) -> None:
    compare(NETS[name], 3, True, NETS[name].rows[:1])
