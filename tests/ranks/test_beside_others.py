"""Beside what others do with the parts of a pipeline: context parallelism of diffusers, offloading, quantised weights."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
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


class Quantised(Tensor):
    """A weight of whole numbers, as torchao's: it can do nothing but ``F.linear``, and not without rows."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Quantised:
        return cls(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return super().__torch_function__(func, types, args, kwargs)
        x, weight, *bias = args
        assert x.numel()
        return F.linear(x, weight.numbers.to(x.dtype) * weight.scale, *bias)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(func)

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(self.numbers.clone(), self.scale.clone())


def quantise(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            numbers = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = torch.nn.Parameter(Quantised(numbers, scale), requires_grad=False)


def test_quantised_weights() -> None:
    """Ranks compare the numbers inside when they convert; those without tokens still have a token for the kernel."""
    run = TRANSFORMER_PIPELINES["FLUX"]
    pipe = run.build()
    plain = run(copy.deepcopy(pipe))
    quantise(pipe.transformer)
    expected = run(copy.deepcopy(pipe))
    assert float((expected - plain).abs().max()) > 100 * TOLERANCE

    def body(rank: int) -> Tensor:
        own = copy.deepcopy(pipe)
        own.transformer.proj_out.weight.numbers[0, 0] += rank
        with pytest.raises(distpatch.RankError, match="convert_model"):
            distpatch.enable(own, fallback="error")
        own.transformer.proj_out.weight.numbers[0, 0] -= rank
        return run(distpatch.enable(own, fallback="error"))

    for picture in run_ranks(3, body):
        assert float((picture - expected).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("when", ["before", "after"])
def test_model_offload(when: str) -> None:
    """diffusers moves each part to its device when it is called, and back when the next one is: here, from CPU to CPU."""
    run = TRANSFORMER_PIPELINES["Wan, text to video"]
    pipe, (expected,) = one_device(run, 1)

    def body(rank: int) -> Tensor:
        own = copy.deepcopy(pipe)
        if when == "before":
            own.enable_model_cpu_offload(device="cpu")
        parallel = distpatch.enable(own, fallback="error")
        if when == "after":
            own.enable_model_cpu_offload(device="cpu")
        assert hasattr(own.transformer, "_hf_hook")
        return run(parallel, seed=0)

    for picture in run_ranks(2, body):
        assert float((picture - expected).abs().max()) <= TOLERANCE
