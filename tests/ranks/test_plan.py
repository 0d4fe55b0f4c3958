"""A plan says what a real run then does: bytes and messages to the byte, FLOPs, and the peak of live activations."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import einops
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import distpatch
from tests.support import forced
from tests.support.oracle import mesh_of, random_tensor
from tests.support.threads import run_ranks
from tests.support.zoo.models import sd_decoder
from tests.support.zoo.unets import CONDITIONED, DOWN, UP


@dataclass(frozen=True)
class Subject:
    """A model and the arguments of one call; ``method`` None is the model itself."""

    build: Callable[[], nn.Module]
    args: tuple[Any, ...]
    method: str | None = None


def wan() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(base_dim=16, z_dim=4, num_res_blocks=1).eval()


def unet() -> nn.Module:
    torch.manual_seed(0)
    config = {**CONDITIONED, "block_out_channels": (32, 64)}
    return diffusers.UNet2DConditionModel(**config, down_block_types=DOWN, up_block_types=UP).eval()


def image(*shape: int) -> torch.Tensor:
    return random_tensor(shape, dtype=torch.float32)


SUBJECTS = {
    "sd": Subject(sd_decoder, (image(1, 4, 7, 8),), "decode"),
    "wan": Subject(wan, (image(1, 4, 2, 9, 8),), "decode"),
    "unet": Subject(unet, (image(2, 4, 26, 24), 3, image(2, 5, 12))),
}


def called(model: nn.Module, subject: Subject) -> Any:
    return (model if subject.method is None else getattr(model, subject.method))(*subject.args)


@pytest.mark.parametrize("name", SUBJECTS)
def test_plan_and_trace_agree(name: str) -> None:
    subject = SUBJECTS[name]
    model = subject.build()
    for world in (2, 3, 4):
        plan = distpatch.plan(model, *subject.args, world_size=world, method=subject.method, device="cpu")

        def body(rank: int) -> distpatch.Trace:
            converted = copy.copy(model)  # its own entry points, the same weights
            converted.__dict__ = dict(model.__dict__)
            distpatch.convert_model(converted, dist.group.WORLD, fallback="error")
            with torch.no_grad(), distpatch.trace(measure=True) as t:
                called(converted, subject)
            return t

        traces = run_ranks(world, body)
        assert [rank.rank for rank in plan.ranks] == list(range(world))
        for planned, real in zip(plan.ranks, traces, strict=True):
            where = f"{name}, rank {planned.rank} of {world}"
            assert planned.trace.records == real.records, where
            assert (planned.sent_bytes, planned.messages) == (real.sent_bytes, real.messages), where
            # One patch of three, which --forced makes of few rows, stands for another one that copies a little more.
            few, some = (0.08, 0.05) if forced.IS_ON else (0, 0)
            assert planned.rounds == real.rounds and planned.launches == pytest.approx(real.launches, rel=few), where
            assert planned.flops == pytest.approx(real.flops, rel=0), where
            assert planned.peak_bytes == pytest.approx(real.peak_bytes, rel=some), where
            assert real.peak_bytes and real.flops and real.wait_seconds > 0 and real.launches and real.rounds
            assert f"{real.launches:,} kernels launched, {real.rounds:,} rounds" in real.table(), where
            assert real.to_dict()["launches"] == sum(cost.launches for cost in real.ops().values())
            assert real.to_dict()["rounds"] == sum(traffic.rounds for traffic in real.traffic())


@pytest.mark.parametrize("backward", [False, True])
def test_plan_and_trace_agree_on_a_mesh(backward: bool) -> None:
    """Over each axis the same messages, in the same order."""
    model, x, dims = sd_decoder((8, 8), 4), image(1, 4, 5, 6), {"dim": (-2, -1)}
    for mesh in ((2, 2), (1, 3)):
        size = mesh[0] * mesh[1]
        how = {"method": "decode", "backward": backward, "device": "cpu", "ranks": range(size)}
        plan = distpatch.plan(model, x, world_size=mesh, options=dims, **how)

        def body(rank: int) -> distpatch.Trace:
            mine = distpatch.convert_model(copy.deepcopy(model), mesh_of(mesh), fallback="error", **dims)
            with torch.set_grad_enabled(backward), distpatch.trace(measure=True) as t:
                out = mine.decode(x).sample
                if backward:
                    out.sum().backward()
            return t

        for planned, real in zip(plan.ranks, run_ranks(size, body), strict=True):
            where = f"rank {planned.rank} of {mesh}"
            assert sorted(planned.trace.records, key=str) == sorted(real.records, key=str), where
            assert backward or planned.trace.records == real.records, where
            assert (planned.sent_bytes, planned.messages) == (real.sent_bytes, real.messages), where
            assert (planned.rounds, planned.flops) == (real.rounds, real.flops), where


class Tokens(nn.Module):
    """A norm of so many rows that they are read in parts; tokens beside a text's; windows of an image that is rolled."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.text = nn.GroupNorm(2, 8).double(), nn.Parameter(random_tensor((1, 5, 8)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.norm(x), 15)
        tokens = torch.cat([self.text, x.flatten(2).transpose(1, 2)], 1)
        tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 5:]
        x = x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        windows = einops.rearrange(x.roll((1, 1), (2, 3)), "b c (h p) (w q) -> (b h w) (p q) c", p=5, q=5)
        windows = windows - windows.mean(1, keepdim=True)
        return einops.rearrange(windows, "(h w) (p q) c -> 1 c (h p) (w q)", h=3, p=5) * x


def test_plan_and_trace_agree_on_tokens_of_a_mesh() -> None:
    model, x, options = Tokens(), random_tensor((1, 8, 401, 300)), {"dim": (-2, -1)}
    plan = distpatch.plan(model, x, world_size=(2, 2), ranks=range(4), device="cpu", options=options)

    def body(rank: int) -> distpatch.Trace:
        mine = distpatch.convert_model(copy.deepcopy(model), mesh_of((2, 2)), fallback="error", dim=(-2, -1))
        with torch.no_grad(), distpatch.trace() as t:
            mine(x)
        return t

    for planned, real in zip(plan.ranks, run_ranks(4, body), strict=True):
        assert planned.trace.records == real.records, f"rank {planned.rank}"


@pytest.mark.parametrize("world", [1, 3])
def test_backward_agrees_too(world: int) -> None:
    """Gradients are sent as a run sends them, and counted."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 3, 3, padding=1))
    x = image(1, 3, 8, 6)
    plan = distpatch.plan(model, x, world_size=world, device="cpu", backward=True)

    def body(rank: int) -> distpatch.Trace:
        mine = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD)
        with distpatch.trace(measure=True) as t:
            mine(x).sum().backward()
        return t

    for planned, real in zip(plan.ranks, run_ranks(world, body), strict=True):
        assert sorted(planned.trace.records, key=str) == sorted(real.records, key=str)
        assert (planned.flops, planned.launches, planned.rounds) == (real.flops, real.launches, real.rounds)
        assert planned.peak_bytes == pytest.approx(real.peak_bytes, rel=0.05)
    assert plan.flops > 2 * distpatch.plan(model, x, world_size=world, device="cpu").flops


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # what torch 2.11 says of itself
def test_ranges_in_a_profile(tmp_path: Path) -> None:
    """Exchanges have names in torch.profiler's Chrome trace, and cost nothing where nobody looks."""
    x = random_tensor((1, 4, 8, 6))
    norm = nn.GroupNorm(2, 4).double()

    def body(rank: int) -> int:
        rows = distpatch.shard(x, dist.group.WORLD)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) if rank == 0 else nullcontext() as seen:
            nn.functional.conv2d(rows, random_tensor((4, 4, 3, 3)), padding=1)
            norm(rows)
        if seen is not None:
            seen.export_chrome_trace(str(tmp_path / "trace.json"))
        with distpatch.trace() as t:
            nn.functional.conv2d(rows, random_tensor((4, 4, 3, 3)), padding=1)
        (record,) = t.records
        assert 0 < record.wait_seconds < 10 and t.to_dict()["wait_seconds"] == t.wait_seconds == record.wait_seconds
        return t.messages

    assert run_ranks(2, body) == [1, 1]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if str(event.get("name")).startswith("distpatch ")]
    assert names == ["distpatch p2p of conv2d", "distpatch wait of conv2d", "distpatch p2p of group_norm"]
    assert all(event["dur"] > 0 for event in events if event["name"] in names)


def test_calibrated_link() -> None:
    """With a group, the link between neighbours is measured too, and a plan's transfers take their time by it."""

    def body(rank: int) -> tuple[distpatch.Device, distpatch.Link | None]:
        return distpatch.calibrate(dist.group.WORLD, seconds=0.1)

    subject = SUBJECTS["sd"]
    for device, link in run_ranks(2, body, timeout=60):
        assert link is not None and link.name.startswith("2 ranks on cpu")
        assert 1e6 < link.bandwidth < 1e12 and 0 < link.start_seconds < 1
        plan = distpatch.plan(subject.build(), *subject.args, world_size=2, method="decode", device=device, link=link)
        seconds = plan.transfer_seconds_of(plan.busiest)
        assert seconds is not None and seconds > plan.busiest.sent_bytes / link.bandwidth
