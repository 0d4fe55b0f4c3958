"""Beside what makes a pipeline's parts parallel already: diffusers' context parallelism, offloading."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import distpatch
from tests.support.threads import run_ranks
from tests.support.transports.late import late
from tests.support.zoo.pipeline import Run
from tests.support.zoo.transformer_pipelines import TRANSFORMER_PIPELINES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
    pytest.mark.filterwarnings("ignore:`torch.distributed._functional_collectives.all_gather_tensor` is deprecated"),
]
TOLERANCE = 2e-5  # fp32


def one_device(run: Run, seeds: int) -> tuple[Any, list[Tensor]]:
    pipe = run.build()
    return pipe, [run(copy.deepcopy(pipe), seed=seed) for seed in range(seeds)]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as ranks: diffusers asks for their number, which is 0 on a machine without any."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("name", ["FLUX", "Wan, text to video"])
def test_context_parallelism_of_diffusers(name: str) -> None:
    """Two pictures on 2 x 2 ranks: the two of each share out tokens by Ulysses, then the decoder's rows, on one mesh."""
    run = TRANSFORMER_PIPELINES[name]
    pipe, expected = one_device(run, 2)

    def body(rank: int) -> Tensor:
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 1, 2), mesh_dim_names=("pictures", "ring", "ulysses"))
        config = diffusers.ContextParallelConfig(ulysses_degree=2, ulysses_anything=True, mesh=mesh)
        own = copy.deepcopy(pipe)
        own.transformer.enable_parallelism(config=config)
        with pytest.raises(ValueError, match="in parallel already"):
            distpatch.enable(own.transformer)
        with pytest.raises(ValueError, match="parallel by diffusers already"):
            distpatch.enable(own, displaced="stale_gn")
        parallel = distpatch.enable(own, fallback="error")
        assert parallel.converted == ("vae",)
        with distpatch.trace() as t:

            def stepped(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                assert not t.records  # while diffusers' collectives may be under way, there are no others
                return tensors

            picture = run(parallel, seed=rank // 2, callback_on_step_end=stepped)
        assert t.messages
        return picture

    with late():
        pictures = run_ranks(4, body)
    for rank, picture in enumerate(pictures):
        assert torch.equal(picture, pictures[rank // 2 * 2])
        assert float((picture - expected[rank // 2]).abs().max()) <= TOLERANCE


def test_enable() -> None:
    """All ranks, of a pipeline or a model, where nobody has made a mesh."""
    run = TRANSFORMER_PIPELINES["Qwen-Image"]
    pipe, (expected,) = one_device(run, 1)

    def body(rank: int) -> None:
        own = copy.deepcopy(pipe)
        assert distpatch.enable(own.vae, fallback="error") is own.vae
        assert float((run(own, seed=0) - expected).abs().max()) <= TOLERANCE
        distpatch.restore_model(own.vae)
        parallel = distpatch.enable(own, dist.group.WORLD, fallback="error")
        assert parallel.converted == ("transformer", "vae")
        assert float((run(own, seed=0) - expected).abs().max()) <= TOLERANCE  # the pipeline itself, too
        parallel.restore()

    run_ranks(2, body)
