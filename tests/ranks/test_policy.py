"""``convert_model(policy="auto")``: calls that every rank computes whole, where that is faster, with the same values."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from distpatch import PatchTensor, RankError
from distpatch.model import policy
from distpatch.torch_utils import chunk_sizes
from tests.support import small_net
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import rank_outcomes, run_ranks

SHAPE = (1, 3, 8, 6)
TRIED = 2 * policy.TRIES
PAUSE = 0.03


class Paused(nn.Module):
    """A convolution that takes long either sharded or whole; ``then``: what is made of it."""

    def __init__(self, slow: str, then: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.slow, self.then = nn.Conv2d(3, 4, 3, padding=1).double(), slow, then

    def forward(self, x: Any) -> Any:
        image = x if isinstance(x, Tensor) else x["image"]
        if isinstance(image, PatchTensor) == (self.slow == policy.SHARDED):
            time.sleep(PAUSE)
        return self.then(self.conv(image))


def on_ranks(net: nn.Module, world: int, body: Callable[[Any, int], Any], **options: Any) -> list[Any]:
    def rank_main(rank: int) -> Any:
        model = distpatch.convert_model(copy.deepcopy(net), dist.group.WORLD, policy="auto", **options)
        with torch.no_grad():
            return body(model, rank)

    return run_ranks(world, rank_main, keep=True)


def ways(model: Any, count: int, make: Callable[[], Any] = lambda: random_tensor(SHAPE)) -> list[str]:
    """How each of so many calls was computed."""
    found = []
    for _ in range(count):
        with distpatch.trace() as t:
            model(make())
        assert not (t.whole and t.records), "a call that is computed whole sends nothing"
        found.append(policy.WHOLE if t.whole else policy.SHARDED)
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("output", ["gather", "shard"])
@pytest.mark.parametrize("rows", [9, 2])
def test_values_and_gradients(rows: int, output: str, world: int) -> None:
    """In every call while both ways are tried, and after; running statistics too."""
    tried = []

    def also(model: Any) -> None:
        with distpatch.trace() as t, torch.no_grad():
            model(random_tensor((2, 3, rows, 6)))
        tried.append(t)

    small_net.check(rows, world, TRIED + 2, also, policy="auto", output=output)
    assert len({bool(t.whole) for t in tried}) == 1


@pytest.mark.parametrize("slow", [policy.SHARDED, policy.WHOLE])
def test_the_faster_way_is_kept(slow: str) -> None:
    fast = policy.WHOLE if slow == policy.SHARDED else policy.SHARDED

    def body(model: Any, rank: int) -> tuple[list[str], str]:
        found = ways(model, TRIED + 3)
        with distpatch.trace() as t:
            model(random_tensor(SHAPE))
        return found, t.table()

    for found, table in on_ranks(Paused(slow), 3, body):
        assert found[: policy.TRIES] == [policy.SHARDED] * policy.TRIES
        assert found[policy.TRIES : policy.TRIES + 2] == [policy.WHOLE] * 2
        assert found[-3:] == [fast] * 3
        assert (f"Paused.forward ({SHAPE} torch.float64): computed whole on every rank, " in table) == (
            fast == policy.WHOLE
        )
        assert ("ms sharded (1 times)" in table) == (fast == policy.WHOLE)


def test_each_shape_is_tried_for_itself() -> None:
    def body(model: Any, rank: int) -> list[str]:
        ways(model, TRIED + 1)
        return ways(model, 1, lambda: random_tensor((1, 3, 9, 6))) + ways(model, 1)

    assert on_ranks(Paused(policy.SHARDED), 2, body) == [[policy.SHARDED, policy.WHOLE]] * 2


def test_what_takes_much_memory_is_always_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = chunk_sizes.BY_KIND["cpu"]
    held = 4 * 8 * 6 * 8  # of all ranks together, the result at the least
    small = type(sizes)(**{**vars(sizes), "whole_bytes": held - 1})
    monkeypatch.setitem(chunk_sizes.BY_KIND, "cpu", small)
    assert on_ranks(Paused(policy.SHARDED), 2, lambda m, _: ways(m, TRIED + 1)) == [[policy.SHARDED] * (TRIED + 1)] * 2


def test_ranks_that_may_round_differently_are_always_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_bits", lambda device: f"rank {dist.get_rank()}")
    assert on_ranks(Paused(policy.SHARDED), 2, lambda m, _: ways(m, TRIED + 1)) == [[policy.SHARDED] * (TRIED + 1)] * 2


def test_off_the_cpu_gradients_need_kernels_that_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("meta")
    with torch.no_grad():
        assert policy._bits(device) == "meta"
    assert policy._bits(device) == ""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert policy._bits(device) == "meta"


def test_rows_that_are_given_stay_sharded() -> None:
    def body(model: Any, rank: int) -> list[str]:
        return ways(model, TRIED + 1, lambda: distpatch.shard(random_tensor(SHAPE), dist.group.WORLD))

    assert on_ranks(Paused(policy.SHARDED), 2, body) == [[policy.SHARDED] * (TRIED + 1)] * 2


def test_values_that_come_one_by_one_stay_sharded() -> None:
    net = Paused(policy.SHARDED, lambda y: (y * n for n in range(2)))

    def body(model: Any, rank: int) -> list[Any]:
        results = [list(model(random_tensor(SHAPE))) for _ in range(TRIED + 1)]
        with distpatch.trace() as t:
            list(model(random_tensor(SHAPE)))
        assert not t.whole
        return results[-1]

    with torch.no_grad():
        right = list(net(random_tensor(SHAPE)))
    for found in on_ranks(net, 2, body):
        for value, expected in zip(found, right, strict=True):
            assert_same(value, expected, 1e-10, "value")


@pytest.mark.parametrize("output", ["gather", "shard", "rank0"])
def test_results_are_handed_over_as_those_of_sharded_calls(output: str) -> None:
    """Images and tokens as rows of the same ranks, a mean as it is, also within structures."""
    net = Paused(
        policy.SHARDED, lambda y: {"image": [y, y], "tokens": y.flatten(2), "turned": y.mT, "mean": y.mean((2, 3))}
    )

    def described(value: Any, layouts: list[Any]) -> Any:
        if isinstance(value, dict):
            return {name: described(item, layouts) for name, item in value.items()}
        if isinstance(value, list):
            return [described(item, layouts) for item in value]
        if isinstance(value, PatchTensor):
            assert value.region.conversion is None
            layouts.append(value.row_layout)
            return value.local
        return value

    def body(model: Any, rank: int) -> None:
        layouts: tuple[list[Any], list[Any]] = [], []
        before = described(model({"image": random_tensor(SHAPE)}), layouts[0])
        ways(model, TRIED, lambda: {"image": random_tensor(SHAPE)})
        with distpatch.trace() as t:
            result = model({"image": random_tensor(SHAPE)})
        assert t.whole and not t.records
        torch.testing.assert_close(described(result, layouts[1]), before, rtol=1e-10, atol=1e-10)
        assert layouts[0] == layouts[1] and len(layouts[0]) == (4 if output == "shard" else 0)
        if output == "gather" or (output == "rank0" and rank == 0):
            assert result["image"][0] is result["image"][1]

    on_ranks(net, 3, body, output=output, fallback="allow")


def test_what_a_model_writes_to_its_input() -> None:
    net = Paused(policy.SHARDED, lambda y: y)

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return self.net(x)

    def body(model: Any, rank: int) -> list[Tensor]:
        given = [random_tensor(SHAPE) for _ in range(TRIED + 1)]
        for x in given:
            model(x)
        return given

    for given in on_ranks(Writing(), 2, body):
        for x in given:
            assert_same(x, random_tensor(SHAPE) + 1, 1e-12, "input")


def test_a_model_that_keeps_rows_between_calls_stays_sharded() -> None:
    class Keeping(Paused):
        kept: Any = None

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.kept = y if self.kept is None else self.kept + y
            return self.kept

    net = Keeping(policy.SHARDED)

    def run(model: Any, rank: int = 0) -> list[Tensor]:
        found = [model(random_tensor(SHAPE, seed=n)) for n in range(TRIED + 1)]
        with distpatch.trace() as t:
            found.append(model(random_tensor(SHAPE, seed=TRIED + 1)))
        assert not t.whole
        return found

    with torch.no_grad():
        right = run(copy.deepcopy(net))
    for found in on_ranks(net, 2, run):
        for value, expected in zip(found, right, strict=True):
            assert type(value) is Tensor
            assert_same(value, expected, 1e-10, "what was kept")


def test_draws_of_a_whole_call_are_one_devices() -> None:
    """Ranks draw the same numbers whichever way: from generators of their own here, which threads do not share."""
    generators: dict[int, torch.Generator] = {}

    def noisy(y: Tensor) -> Tensor:
        drawn = torch.empty(y.shape, dtype=torch.float64).normal_(generator=generators[dist.get_rank()])
        return y + drawn

    net = Paused(policy.SHARDED, noisy)

    def body(model: Any, rank: int) -> list[Tensor]:
        generators[rank] = torch.Generator().manual_seed(5)
        return [model(random_tensor(SHAPE)) for _ in range(TRIED + 1)]

    draws, conv = torch.Generator().manual_seed(5), net.conv(random_tensor(SHAPE)).detach()
    right = [conv + torch.empty(conv.shape, dtype=torch.float64).normal_(generator=draws) for _ in range(TRIED + 1)]
    for found in on_ranks(net, 2, body):
        for value, expected in zip(found, right, strict=True):
            assert_same(value, expected, 1e-10, "draws")


def test_ranks_called_differently_are_named_where_they_meet() -> None:
    net = Paused(policy.SHARDED)

    def body(rank: int) -> None:
        model = distpatch.convert_model(copy.deepcopy(net), dist.group.WORLD, policy="auto")
        with torch.no_grad():
            assert ways(model, TRIED + 1)[-1] == policy.WHOLE
            if rank == 1:
                assert_same(model(random_tensor(SHAPE)), net(random_tensor(SHAPE)), 1e-10, "asks nobody")
            model(random_tensor((1, 3, 9 + rank, 6)))

    for outcome in rank_outcomes(2, body):
        assert isinstance(outcome, RankError) and "called differently" in str(outcome)


def test_a_failed_trial_is_made_again() -> None:
    """A rank that fails in a trial has no time for it: all ranks go on alike."""
    net = Paused(policy.SHARDED)

    def body(model: Any, rank: int) -> str:
        def fails(module: nn.Module, args: Any) -> None:
            raise ValueError("once")

        for _ in range(TRIED + 1):
            hook = model.conv.register_forward_pre_hook(fails) if rank == 1 else None
            with pytest.raises((ValueError, RankError)) if rank == 1 else Maybe():
                model(random_tensor(SHAPE))
            if hook is not None:
                hook.remove()
            model(random_tensor(SHAPE))
        return ways(model, TRIED)[-1]

    assert on_ranks(net, 2, body) == [policy.WHOLE] * 2


class Maybe:
    """A whole call of this rank is right, whatever happens to the other; a sharded one names it."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, where: Any) -> bool:
        return isinstance(error, RankError)


def test_alone_there_is_nothing_to_choose() -> None:
    model = distpatch.convert_model(nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False), policy="auto")
    assert set(ways(model, TRIED + 1, lambda: torch.ones(SHAPE))) == {policy.SHARDED}


def test_options_that_are_refused() -> None:
    net = nn.Conv2d(3, 3, 3)
    with pytest.raises(ValueError, match=r"policy is one of \('shard', 'auto'\); got 'small'"):
        distpatch.convert_model(net, policy="small")
    with pytest.raises(ValueError, match='policy="auto" tries calls both ways'):
        distpatch.convert_model(net, policy="auto", compile=True)


def test_policies_that_differ_among_ranks_are_refused() -> None:
    net = nn.Conv2d(3, 3, 3)

    def body(rank: int) -> None:
        distpatch.convert_model(copy.deepcopy(net), dist.group.WORLD, policy=("auto", "shard")[rank])

    for outcome in rank_outcomes(2, body):
        assert isinstance(outcome, RankError) and "policy='shard'" in str(outcome)
