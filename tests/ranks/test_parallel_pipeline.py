"""``parallelize_pipeline``: whole pipelines with displaced steps, and with guidance on two halves of the ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import distpatch
from tests.support.threads import run_ranks
from tests.support.zoo import pipeline_runs as runs
from tests.support.zoo.pipeline import Run
from tests.support.zoo.pipelines import PIPELINES
from tests.support.zoo.transformer_pipelines import TRANSFORMER_PIPELINES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")]
TOLERANCE = 1e-8  # fp64, after all steps of a net with random weights
STABLE = PIPELINES["Stable Diffusion"]
STEPS = 10


def double(run: Run) -> Any:
    return run.build().to(torch.float64)


def call(run: Run, pipe: Any, **more: Any) -> Tensor:
    given = {key: t.double() if isinstance(t, Tensor) else t for key, t in run.call.items()}
    return run(pipe, **{"num_inference_steps": STEPS, **given, **more})


def compare(
    run: Run,
    world: int,
    mesh: Callable[[], Any] = lambda: dist.group.WORLD,
    tolerance: float = TOLERANCE,
    before: Callable[[Any], object] = lambda pipe: None,
    **more: Any,
) -> float:
    """The largest difference from one device; the same bits on all ranks."""
    pipe = double(run)
    before(pipe)
    options = {key: more.pop(key) for key in ("displaced", "fallback", "denoisers") if key in more}
    expected = call(run, copy.deepcopy(pipe), **more)

    def body(rank: int) -> Tensor:
        own = distpatch.parallelize_pipeline(copy.deepcopy(pipe), mesh(), **{"fallback": "error", **options})
        return call(run, own, **more)

    pictures = run_ranks(world, body)
    assert expected.isfinite().all() and expected.std() > 1e-3
    for picture in pictures:
        assert torch.equal(picture, pictures[0])
    error = float((pictures[0] - expected).abs().max())
    assert error <= tolerance, error
    return error


@pytest.mark.parametrize(
    ("name", "world"), [("Stable Diffusion", 2), ("Stable Diffusion", 4), ("SDXL", 3), ("SDXL", 4)]
)
def test_full_sync(name: str, world: int) -> None:
    """Five rows of latents: uneven on all worlds."""
    compare(PIPELINES[name], world, displaced="full_sync")


@pytest.mark.parametrize("name", ["FLUX", "Wan, text to video"])
def test_many_steps_of_transformers(name: str) -> None:
    """Tokens, as the transformer's own plan splits them, and videos; from step to step they stay sharded."""
    compare(PIPELINES[name], 3, denoisers=("transformer",))


# The most that all ranks together may send for each bytes of latents and each rank but one, where rows are not as the
# denoiser leaves them: parts of a row of tokens; whole clips that are turned from frames to rows.
RESLICED = {"FLUX": 0.25, "Qwen-Image": 0.25, "LTX": 1.0, "HunyuanVideo": 0.5}


@pytest.mark.parametrize("name", TRANSFORMER_PIPELINES)
def test_transformers(name: str) -> None:
    """One device's picture; between the last step's denoiser and the decoder, tokens are at most sliced anew."""
    for world, found in runs.compare(name, [2, 3], fallback="error").items():
        assert found.error <= 2e-5 and found.same_bits  # fp32
        assert found.kinds <= {"p2p"} and found.ops <= {"view", "reshape", "decode"}, found
        assert found.sent_bytes <= RESLICED.get(name, 0) * (world - 1) * found.latent_bytes, found


def test_latents_stay_sharded() -> None:
    """Between steps and into the decoder, also where one half of the ranks hands them to all."""
    pipe = double(STABLE)

    def body(rank: int) -> None:
        for mesh, to_all in ((dist.group.WORLD, 0), (distpatch.guidance_mesh(), 1)):
            own = distpatch.parallelize_pipeline(copy.deepcopy(pipe), mesh, displaced="stale_gn", fallback="error")
            latents = call(STABLE, own, num_inference_steps=2, output_type="latent")
            assert type(latents) is Tensor
            with distpatch.trace() as t:
                call(STABLE, own, num_inference_steps=2)
            gathered = [record for record in t.records if record.op in {"gather", "output"}]
            assert len(gathered) == 1  # the picture
            assert sum(record.op == "guidance" for record in t.records) == 2 * to_all
            assert own.steps["unet"].calls == 0 and own.unet is own.pipe.unet
            assert own.restore() is own.pipe and "decode" not in vars(own.vae) and "forward" not in vars(own.unet)

    run_ranks(4, body)


def test_calls_that_fail() -> None:
    """In a callback between two steps: the next call begins with nothing left of this one."""
    pipe = double(STABLE)
    expected = call(STABLE, copy.deepcopy(pipe), num_inference_steps=2)

    def interrupt(pipe: Any, step: int, time: int, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return tensors

    def body(rank: int) -> Tensor:
        own = distpatch.parallelize_pipeline(copy.deepcopy(pipe), displaced={"warmup_steps": 1})
        with pytest.raises(KeyboardInterrupt):
            call(STABLE, own, num_inference_steps=6, callback_on_step_end=interrupt)
        return call(STABLE, own, num_inference_steps=2)

    for picture in run_ranks(2, body):
        torch.testing.assert_close(picture, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_refused() -> None:
    built = STABLE.build()

    def body(rank: int) -> None:
        pipe = copy.deepcopy(built)
        with pytest.raises(ValueError, match="one of full_sync"):
            distpatch.parallelize_pipeline(pipe, displaced="lossy")
        with pytest.raises(ValueError, match="none of the components"):
            distpatch.parallelize_pipeline(pipe, denoisers=["prior"])
        with pytest.raises(distpatch.LayoutError, match="two halves"):
            distpatch.guidance_mesh()
        with pytest.raises(distpatch.LayoutError, match="guidance_mesh"):
            distpatch.parallelize_pipeline(pipe, DeviceMesh("cpu", torch.arange(3).view(1, 3)))
        assert "forward" not in vars(pipe.unet)

    run_ranks(3, body)

    def odd(rank: int) -> None:
        own = distpatch.parallelize_pipeline(copy.deepcopy(built), distpatch.guidance_mesh())
        with pytest.raises(distpatch.LayoutError, match="batch of 1 has no two halves"):
            call(STABLE, own, guidance_scale=1.0, num_inference_steps=1)

    run_ranks(2, odd)


@pytest.mark.parametrize("world", [2, 4])
def test_guidance_on_two_halves(world: int) -> None:
    compare(STABLE, world, distpatch.guidance_mesh, num_inference_steps=4)
    error = compare(
        STABLE, world, distpatch.guidance_mesh, tolerance=0.2, num_inference_steps=4, displaced={"warmup_steps": 1}
    )
    assert (error < TOLERANCE) == (world == 2)  # one rank a half has nobody to wait for


SCHEDULERS = {
    "DDPM": {},
    "PNDM": {"skip_prk_steps": True},
    "EulerDiscrete": {},
    "EulerAncestralDiscrete": {},
    "HeunDiscrete": {},
    "DPMSolverMultistep": {},
    "UniPCMultistep": {},
    "LCM": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    def other(pipe: Any) -> None:
        pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config, **SCHEDULERS[name])

    compare(STABLE, 2, before=other, num_inference_steps=3)
