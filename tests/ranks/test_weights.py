"""``convert_model(weights=...)``: rows in proportion to each rank's speed, and the same values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distpatch
from distpatch import RankError
from distpatch.model import speeds
from distpatch.model.convert import is_converted
from distpatch.planning import fake_run
from tests.support import small_net
from tests.support.oracle import random_tensor
from tests.support.threads import rank_outcomes, run_ranks

WEIGHTS: list[tuple[float, ...]] = [(5,), (1, 2), (1, 0.1), (3, 1, 2), (1, 1, 5, 0.2)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("rows", [48, 9, 3, 1])
def test_values_and_gradients(rows: int, weights: tuple[float, ...]) -> None:
    if rows == 1 and weights == (5,):
        rows = 2  # of a batch norm of one value per channel nothing is asked here
    small_net.check(rows, len(weights), weights=weights)


@pytest.mark.parametrize("weights", [(1, 2), [1.0, 2.0], torch.tensor([1, 2])], ids=repr)
def test_rows_are_shared_by_the_weights(weights: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)).double()

    def body(rank: int) -> tuple[int, ...]:
        model = distpatch.convert_model(copy.deepcopy(net), dist.group.WORLD, weights=weights, output="shard")
        with torch.no_grad():
            return model(random_tensor((1, 3, 48, 6))).row_layout.heights

    assert run_ranks(2, body, keep=True) == [(8, 16)] * 2


def test_another_dim_is_shared_by_the_weights_too() -> None:
    """Where an operation needs all rows, it is turned, and each rank gets columns by its weight."""

    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft(x, dim=-2).real

    def body(rank: int) -> list[int]:
        model = distpatch.convert_model(Turned(), dist.group.WORLD, weights=(1, 3))
        with distpatch.trace() as t, torch.no_grad():
            model(random_tensor((1, 1, 8, 8)))
        return [record.sent_bytes for record in t.records if record.op != "output"]

    # There 2 rows of 6 columns (fp64), or 6 rows of 2; and back as complex numbers.
    there, back = 2 * 6 * 8, 2 * 6 * 16
    assert run_ranks(2, body, keep=True) == [[there, back]] * 2


MALFORMED: dict[str, Any] = {
    "too few": (1,),
    "too many": (1, 2, 3),
    "zero": (1, 0),
    "negative": (1, -2),
    "NaN": (1, float("nan")),
    "infinite": (1, float("inf")),
    "a number": 3,
    "a word": "fast",
    "words": ("a", "b"),
}


@pytest.mark.parametrize("weights", MALFORMED.values(), ids=MALFORMED)
def test_weights_that_are_none(weights: Any) -> None:
    net = nn.Conv2d(3, 3, 3)

    def body(rank: int) -> None:
        model = copy.deepcopy(net)
        with pytest.raises(ValueError, match=r'weights is "measured", or one positive number for each of the 2 rank'):
            distpatch.convert_model(model, dist.group.WORLD, weights=weights)
        assert not is_converted(model)

    run_ranks(2, body, keep=True)


def test_weights_that_differ_among_ranks_are_refused_on_all() -> None:
    net = nn.Conv2d(3, 3, 3)

    def body(rank: int) -> None:
        weights = ((1, 2), (1, float("nan")))[rank]
        distpatch.convert_model(copy.deepcopy(net), dist.group.WORLD, weights=weights)

    for outcome in rank_outcomes(2, body):
        assert isinstance(outcome, RankError)
        assert "weights=(1.0, 2.0)" in str(outcome) and "weights=(1.0, nan)" in str(outcome)


@pytest.mark.parametrize(
    ("seconds", "heights"), [((1.0, 2.0), (16, 8)), ((1.0, 1.05), (12, 12)), ((1.0, 4.0, 2.0), (14, 3, 7))], ids=str
)
def test_measured(seconds: tuple[float, ...], heights: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks know all times, and share alike; those that differ by little count as one."""
    monkeypatch.setattr(speeds, "seconds_of", lambda model: seconds[dist.get_rank()])

    net = nn.Conv2d(3, 3, 3, padding=1).double().requires_grad_(False)

    def body(rank: int) -> tuple[int, ...]:
        model = copy.deepcopy(net)
        distpatch.convert_model(model, dist.group.WORLD, weights="measured", output="shard")
        return model(random_tensor((1, 3, 24, 5))).row_layout.heights

    assert run_ranks(len(seconds), body, keep=True) == [heights] * len(seconds)


def test_a_rank_is_measured() -> None:
    net = nn.Conv2d(3, 3, 3).bfloat16()
    state = torch.get_rng_state()
    seconds = speeds.seconds_of(net)
    assert 0 < seconds < 1
    assert torch.equal(state, torch.get_rng_state())
    assert speeds.seconds_of(nn.Identity()) > 0


def test_measured_with_nobody_to_compare_with() -> None:
    model = distpatch.convert_model(nn.Conv2d(3, 3, 3, padding=1), weights="measured")
    assert model(torch.ones(1, 3, 4, 4)).shape == (1, 3, 4, 4)


def test_a_plan_shares_rows_as_a_run_does() -> None:
    net = small_net.SmallNet().requires_grad_(False).eval()
    x = torch.randn(2, 3, 48, 6, generator=torch.Generator().manual_seed(0))
    options = {"weights": (1, 2), "lazy": False}
    planned = fake_run.plan(net, x, world_size=2, device="cpu", options=options)

    def body(rank: int) -> list[tuple[str, str, int]]:
        model = distpatch.convert_model(copy.deepcopy(net), dist.group.WORLD, fallback="allow", **options)
        with distpatch.trace() as t, torch.no_grad():
            model(x)
        return [(record.kind, record.op, record.sent_bytes) for record in t.records]

    assert [rank.rows for rank in planned.ranks] == [16, 32]
    for mine, rank in zip(run_ranks(2, body, keep=True), planned.ranks, strict=True):
        assert mine == [(record.kind, record.op, record.sent_bytes) for record in rank.trace.records]
    with pytest.raises(ValueError, match="weights is"):
        fake_run.plan(net, x, world_size=3, device="cpu", options=options)
    assert [rank.rows for rank in fake_run.plan(net, x, world_size=2, options={"weights": "measured"}).ranks] == [
        24,
        24,
    ]
