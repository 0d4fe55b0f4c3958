"""``plan``: what it leaves alone, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import distpatch
from distpatch.lazy import deferred_ops, recipe
from distpatch.planning.ranks_to_run import ranks_to_run
from tests.support import forced
from tests.support.oracle import random_tensor
from tests.support.zoo.models import tiny_kl


class Pixels(nn.Module):
    """Convolutions of single pixels, so that no row is computed twice; ``extra``: what else happens."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)
        self.plain = nn.Parameter(torch.zeros(1, 4, 6, 6))
        self.register_buffer("table", torch.zeros(10))
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if self.extra is None else self.extra(self, x, y)


def plan(model: nn.Module, rows: int = 12, **options: Any) -> distpatch.Plan:
    return distpatch.plan(model, torch.zeros(1, 4, rows, 6), **options)


def test_the_model_stays_itself() -> None:
    model = tiny_kl(dtype=torch.float32)
    handle = model.decoder.register_forward_hook(lambda *args: None)
    before, attributes = {k: (v, v.clone(), v._version) for k, v in model.state_dict().items()}, dict(model.__dict__)
    z = random_tensor((1, 4, 6, 5), dtype=torch.float32)
    kept = z.clone()
    found = distpatch.plan(model, z, world_size=2, method="decode")
    assert model.__dict__ == attributes and handle.id in model.decoder._forward_hooks
    for key, tensor in model.state_dict().items():
        known, values, version = before[key]
        assert tensor.data_ptr() == known.data_ptr() and tensor._version == version and torch.equal(tensor, values)
    assert torch.equal(z, kept)
    assert found.parameter_bytes == sum(p.nbytes for p in model.parameters())


def test_real_meta_and_fake_models_plan_alike() -> None:
    x = torch.zeros(1, 4, 6, 5)
    expected = distpatch.plan(tiny_unetish(), x, world_size=2).to_dict()
    assert distpatch.plan(tiny_unetish().to("meta"), x.to("meta"), world_size=2).to_dict() == expected
    with FakeTensorMode():
        fake, given = tiny_unetish(), torch.zeros(1, 4, 6, 5)
        inside = distpatch.plan(fake, given, world_size=2).to_dict()
    assert inside == expected == distpatch.plan(fake, given, world_size=2).to_dict()


@pytest.mark.skipif(forced.IS_ON, reason="the numbers are those of a convolution that is not cut")
def test_numbers_by_hand() -> None:
    found = plan(Pixels(), world_size=3, device="cpu", options={"output": "shard"})
    assert [(rank.rank, rank.rows, rank.stands_for) for rank in found.ranks] == [(0, 4, 1), (1, 4, 1), (2, 4, 1)]
    assert found.flops == 2 * 4 * 8 * 12 * 6 and found.imbalance == 1.0 and found.sent_bytes == 0
    assert found.peak_bytes == 4 * 8 * 4 * 6 and found.worst.peak_op.startswith("aten.convolution")
    assert (found.parameter_bytes, found.buffer_bytes, found.input_bytes) == (4 * (40 + 144), 40, 4 * 4 * 12 * 6)
    assert found.memory_bytes == found.peak_bytes + 4 * 184 + 40 + 1152
    assert found.seconds is None and found.replicated_share == 0.0 and found.fallbacks == []


def test_uneven_ranks_stand_for_each_other() -> None:
    """Seven ranks and twelve rows: the sums are those of all ranks, of which only some were run."""
    some, every = (plan(tiny_unetish(), world_size=7, ranks=ranks) for ranks in (None, range(7)))
    assert len(some.ranks) == 4 and sum(rank.stands_for for rank in some.ranks) == 7
    assert (some.flops, some.peak_bytes, some.imbalance) == (every.flops, every.peak_bytes, every.imbalance)
    assert some.imbalance > 1.0
    idle = plan(tiny_unetish(), rows=2, world_size=512)
    assert sum(rank.stands_for for rank in idle.ranks) == 512 and min(rank.rows for rank in idle.ranks) == 0


def tiny_unetish() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1))


def test_representatives() -> None:
    assert ranks_to_run([[3, 3, 2]], None) == {0: 1, 1: 1, 2: 1}
    assert ranks_to_run([[3, 3, 3, 2, 2, 2]], None) == {0: 1, 1: 2, 3: 2, 5: 1}
    assert ranks_to_run([[3, 3, 3, 2, 2, 2]], [-1]) == {5: 6}
    assert ranks_to_run([[3, 3, 3, 2, 2, 2]], [0, 2]) == {0: 1, 2: 5}
    for wrong in ([], [6], [-7]):
        with pytest.raises(ValueError, match="from 0 to 5"):
            ranks_to_run([[3, 3, 3, 2, 2, 2]], wrong)


def test_representatives_of_a_mesh() -> None:
    """Corners, edges and what is inside, of each size of part."""
    assert ranks_to_run([[2, 2], [3, 2]], None) == {0: 1, 1: 1, 2: 1, 3: 1}
    few = ranks_to_run([[4] * 8, [4] * 8], None)
    assert sorted(few.values()) == [1] * 4 + [6] * 4 + [36]


def test_choice_of_a_mesh() -> None:
    square = distpatch.choose_mesh((1, 4, 512, 512), 64)
    assert (square.mesh, square.dim, square.part, square.edge) == ((8, 8), (-2, -1), (64, 64), 256)
    assert (
        "8 x 8 ranks along dims (-2, -1): at the most 64 x 64 a rank" in square.why and "64 ranks along" in square.why
    )
    assert distpatch.choose_mesh((1, 4, 64, 64), 2).dim == -2  # of two that send alike, the rows
    assert distpatch.choose_mesh((1, 4, 90, 160), 2).dim == -1
    uneven = distpatch.choose_mesh((1, 4, 9, 16), 6)
    assert uneven.mesh == (3, 2) and uneven.imbalance == 1
    assert distpatch.choose_mesh((1, 4, 30, 5, 5), 30, dims=(-3, -2, -1)).imbalance == 1
    assert distpatch.choose_mesh((1, 4, 8, 8), 1).mesh == (1,)
    with pytest.raises(ValueError, match="67 ranks cannot each have a part"):
        distpatch.choose_mesh((1, 4, 8, 8), 67)


def test_plan_of_a_mesh() -> None:
    x = torch.empty(1, 4, 32, 32, device="meta")
    chosen = distpatch.plan(tiny_unetish(), x, world_size=16, device="cpu", options={"dim": "auto"})
    assert (chosen.world_size, chosen.mesh, chosen.dims) == (16, (4, 4), (-2, -1))
    assert "on 16 ranks (4 x 4 along dims (-2, -1))" in chosen.table() and "(8 x 8; stands for 4)" in chosen.table()
    rows = distpatch.plan(tiny_unetish(), x, world_size=16, device="cpu")
    halo = 4 * 2 * 4  # bytes of a pixel of one row on each side
    assert chosen.sent_bytes - rows.sent_bytes < halo * (16 + 2 + 2 - 32) + 2**10
    assert chosen.imbalance < 1.06 and rows.imbalance == 1  # of a corner less is computed at seams
    with pytest.raises(ValueError, match="one for each dim"):
        distpatch.plan(tiny_unetish(), x, world_size=16, options={"dim": (-2, -1)})


def test_replicated_share() -> None:
    """What every rank computes in full: of plain tensors, and of gathered ones."""

    def beside(model: Pixels, x: Tensor, y: Tensor) -> Tensor:
        return y + model.conv(model.plain).mean()

    alone, found = (plan(Pixels(beside), world_size=size, device="cpu") for size in (1, 4))
    replicated = 2 * 4 * 8 * 6 * 6
    assert {rank.replicated_flops for rank in found.ranks} == {replicated}
    assert found.flops - alone.flops == 3 * replicated, "four times, where one device computes it once"
    assert found.replicated_share == pytest.approx(replicated / alone.flops) == pytest.approx(1 / 3)

    def gathered(model: Pixels, x: Tensor, y: Tensor) -> Tensor:
        return y + torch.linalg.matrix_power(x, 3).sum()

    with_fallback = plan(Pixels(gathered), rows=6, world_size=4, device="cpu")
    products, convolution = 2 * 4 * 2 * 6**3, 2 * 4 * 8 * 6 * 6
    assert [f.op for f in with_fallback.fallbacks] == ["linalg_matrix_power"]
    assert with_fallback.replicated_share == pytest.approx(products / (products + convolution))
    assert "gathered: linalg_matrix_power, 1 times" in with_fallback.table()


def test_table_json_and_rich() -> None:
    found = distpatch.plan(tiny_unetish(), torch.zeros(1, 4, 6, 5), world_size=4)
    text = found.table()
    assert "Sequential.forward of (1, 4, 6, 5) on 4 ranks" in text and "NVLink 4" in text and "fits" in text
    ops = {op.op: op for op in found.ops()}
    assert {"conv2d", "group_norm", "silu", "output"} <= ops.keys()
    data = json.loads(found.to_json())
    assert found.busiest.sent_bytes == sum(op.sent_bytes for op in ops.values()) > 0
    assert data["sent_bytes"] == found.sent_bytes == max(rank["sent_bytes"] for rank in data["ranks"])
    assert data["messages"] == sum(op["messages"] for op in data["ranks"][1]["ops"]) > 0
    assert found.flops == sum(rank["flops"] for rank in data["ranks"])
    busiest = found.busiest
    assert busiest.flops == sum(op.flops for op in ops.values())
    assert found.seconds == pytest.approx(
        sum((op.compute_seconds or 0) + (op.transfer_seconds or 0) for op in ops.values())
    )
    console = Console(width=150)
    with console.capture() as shown:
        console.print(found)
    assert "group_norm" in shown.get() and "the busiest" in shown.get()


def test_smallest_plan() -> None:
    model, x = tiny_unetish(), torch.zeros(1, 4, 64, 64)
    room = distpatch.plan(model, x, world_size=5).memory_bytes
    found = distpatch.smallest_plan(model, x, memory_bytes=room)
    assert found is not None and found.world_size == 5
    assert not distpatch.plan(model, x, world_size=4).fits(room)
    assert distpatch.smallest_plan(model, x, memory_bytes=1, most=8) is None
    whole = distpatch.smallest_plan(model, x)
    assert whole is not None and whole.world_size == 1 and whole.fits()
    with pytest.raises(ValueError, match="memory_bytes"):
        distpatch.smallest_plan(model, x, device="cpu")


def test_what_is_done_once_a_process_is_in_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first deferred convolution of a process tells malloc something, which is no activation."""
    monkeypatch.setattr(recipe, "LEAST_BYTES", 0)
    deferred_ops._keep_freed_patches.cache_clear()
    first, second = (
        distpatch.plan(tiny_unetish(), torch.zeros(1, 4, 64, 64), world_size=2, device="cpu", options={"splits": 3})
        for _ in range(2)
    )
    assert first.peak_bytes == second.peak_bytes < 1 << 20


def test_a_slow_host() -> None:
    """It is what takes time, more of it on more ranks, and is said to; a host that takes none is never."""
    image = torch.zeros(1, 4, 64, 64)
    slow = distpatch.scaling(tiny_unetish(), image, world_sizes=(1, 4), host=1e-3)
    alone, several = slow
    assert alone.bound == several.bound == "host"
    assert several.host_seconds == several.busiest.launches * 1e-3 < (several.seconds or 0)
    assert slow.fastest is alone and "more than 1 rank take longer" in slow.table()
    assert "host-bound" in alone.table() and '"bound": "host"' in alone.to_json()
    at_once = distpatch.plan(tiny_unetish(), image, world_size=2, host=0.0)
    assert at_once.host_seconds == 0.0 and at_once.bound in {"computing", "sending"}
    assert "host-bound" not in at_once.table()
    unknown = distpatch.plan(tiny_unetish(), image, world_size=2, device="cpu")
    assert unknown.bound is None and unknown.host_seconds is None
    with pytest.raises(ValueError, match="host"):
        distpatch.plan(tiny_unetish(), image, host=-1.0)


def test_scaling(tmp_path: Path) -> None:
    found = distpatch.scaling(tiny_unetish(), torch.zeros(1, 4, 64, 64), world_sizes=(1, 2, 16))
    assert [plan.world_size for plan in found] == [1, 2, 16]
    assert [line.split()[0] for line in found.table().splitlines()[2:5]] == ["1", "2", "16"]
    second = found.plans[1]
    assert found.smallest(second.memory_bytes) is second and found.smallest(1) is None
    assert len(json.loads(found.to_json())) == 3
    found.plot(tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_asks_for_a_value() -> None:
    def asks(model: Pixels, x: Tensor, y: Tensor) -> Tensor:
        return y if y.sum() > 0 else -y

    with pytest.raises(distpatch.UnsupportedOpError, match="Pixels asks for the value of a tensor"):
        plan(Pixels(asks))
    model = Pixels(asks)
    model.extra = None
    assert plan(model).flops > 0


def test_refused() -> None:
    model = Pixels()
    for options, message in (
        ({"world_size": 0}, "world_size is a number from 1"),
        ({"method": "decode"}, "Pixels has no method 'decode'"),
        ({"device": "abacus"}, "device is one of"),
        ({"ranks": [8]}, "from 0 to 7"),
        ({"options": {"fallback": "never"}}, "fallback is one of"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(model, **options)
    with pytest.raises(TypeError, match="nn.Module"):
        plan(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(distpatch.LayoutError, match="no argument can be sharded"):
        distpatch.plan(model, torch.zeros(3))
    distpatch.convert_model(model)
    with pytest.raises(distpatch.DistPatchError, match="restore_model first"):
        plan(model)


def test_backward_takes_a_share_of_the_memory() -> None:
    """Of one rank's: what autograd keeps, random masks and gradients of the halo included."""
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Dropout(0.1), nn.Conv2d(64, 64, 3, padding=1)).train()
    x = torch.empty(1, 64, 512, 512, device="meta")
    peaks = {}
    for world in (1, 2, 4, 8):
        found = distpatch.plan(net, x, world_size=world, backward=True, device="cpu", options={"output": "shard"})
        peaks[world] = max(rank.peak_bytes for rank in found.ranks)
    assert all(peak <= 1.15 / world * peaks[1] for world, peak in peaks.items()), peaks
