"""``convert_model(attention=)``: keys one rank's after the other, or all turned to heads; every case of attention, either way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from distpatch.rules.linalg import attention, ring_attention
from distpatch.rules.linalg.kept_scores import with_sums
from distpatch.tensor import options
from tests.ranks.test_attention import CASES
from tests.support import oracle
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks
from tests.support.zoo.transformers_of_diffusers import TRANSFORMERS, compare

WAYS = ("ring", "all_to_all")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 5])
def test_sums_that_the_kernel_tells(dtype: torch.dtype, width: int) -> None:
    """By which parts of the keys merge; values of another width have no such kernel."""
    query, key, value = (random_tensor((2, 3, n, d)).to(dtype) for n, d in ((5, 8), (7, 8), (7, width)))
    found = with_sums(query, key, value, 0.3)
    if width == 5:
        assert found is None
        return
    assert found is not None
    scores = query.double() @ key.double().mT * 0.3
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found[0].double(), scores.softmax(-1) @ value.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1].double(), scores.logsumexp(-1, True), rtol=tolerance, atol=tolerance)


@pytest.fixture(params=WAYS)
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(options, "DEFAULT", replace(options.DEFAULT, attention=request.param))
    yield request.param


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_gathered(case: Any, way: str) -> None:
    known = {name: value for name, value in case.keywords.items() if name != "p2p"}  # it counts the rounds of a gather
    partial(case.func, *case.args, **known)()


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "Krea2Transformer2DModel"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_transformers(name: str, backward: bool) -> None:
    for chosen in WAYS:
        result = compare(name, 2, backward=backward, attention=chosen)
        assert max(result.error, result.gradient) <= 1e-9 and TRANSFORMERS[name].gathered == tuple(result.gathered)
        oracle.compared += 1


def operands(heads: int, tokens: int, chosen: str, queries: int | None = None) -> list[distpatch.PatchTensor]:
    """Queries, keys and values, sharded along their tokens."""
    region = distpatch.shard(torch.zeros(2, 2), dist.group.WORLD).region
    region = replace(region, options=options.Options(attention=chosen))
    sharded = []
    for seed, count in enumerate((queries or tokens, tokens, tokens)):
        x = distpatch.shard(random_tensor((1, heads, count, 8), seed), dist.group.WORLD)
        x.region = region
        sharded.append(x)
    return sharded


def traced(heads: int, tokens: int, world: int, chosen: str, call: Callable[..., Tensor]) -> list[Any]:
    def body(rank: int) -> Any:
        sharded = operands(heads, tokens, chosen)
        with torch.no_grad(), distpatch.trace() as t:
            result = call(*sharded)
            records = [record for record in t.records if record.kind == "p2p"]
        return distpatch.gather(result), sum(record.sent_bytes for record in records), len(records)

    return run_ranks(world, body)


def test_bytes_and_rounds() -> None:
    """Of four ranks, each sends half as many bytes where all is turned to heads; a ring as many as a gather."""
    call = F.scaled_dot_product_attention
    right = call(*(random_tensor((1, 4, 32, 8), seed) for seed in range(3)))
    sent = {}
    for chosen in ("gather", *WAYS):
        for result, size_bytes, rounds in traced(4, 32, 4, chosen, call):
            torch.testing.assert_close(result, right, rtol=1e-10, atol=1e-10)
            sent[chosen] = size_bytes, rounds
    own = 4 * 8 * 8 * 8  # bytes of a rank's keys
    assert sent == {"gather": (2 * 3 * own, 1), "ring": (2 * 3 * own, 3), "all_to_all": (4 * 3 * own // 4, 2)}


def test_a_ring_holds_the_keys_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """And scores of as many queries as they may take."""
    monkeypatch.setattr(attention, "SCORE_BYTES", 3 * 4 * 6 * 8)
    largest: list[int] = []
    scored = attention.ring.__globals__["_scored"]

    def seen(query: Tensor, both: Tensor, *rest: Any) -> Any:
        largest.append(math.prod(query.shape[:-1]) * both.shape[-2] * 8)
        assert both.shape[-2] <= 6
        return scored(query, both, *rest)

    monkeypatch.setitem(attention.ring.__globals__, "_scored", seen)
    mask = random_tensor((23, 23), 7)
    call = partial(F.scaled_dot_product_attention, attn_mask=mask)
    right = call(*(random_tensor((1, 4, 23, 8), seed) for seed in range(3)))
    for result, *_ in traced(4, 23, 4, "ring", call):
        torch.testing.assert_close(result, right, rtol=1e-10, atol=1e-10)
    assert max(largest) <= 3 * 4 * 6 * 8


def test_memory_of_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its own keys and values a rank holds as many as one rank has; a gather holds those of all."""
    monkeypatch.setattr(ring_attention, "PART_BYTES", 1)
    world, heads, tokens = 8, 2, 768
    of_a_rank = 2 * heads * tokens * 8 * 8 // world

    def body(rank: int, chosen: str) -> int:
        given = operands(heads, tokens, chosen, queries=world)  # of whose results there are few
        with torch.no_grad(), distpatch.LivePeak() as live, distpatch.trace() as t:
            F.scaled_dot_product_attention(*given)
        assert bool(t.waits) == (chosen == "ring"), "it is posted before what came last is attended to"
        return live.peak_bytes

    held = {chosen: max(run_ranks(world, partial(body, chosen=chosen))) for chosen in ("ring", "gather")}
    assert held["ring"] <= 1.2 * of_a_rank and held["gather"] >= world * of_a_rank


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes: turned to heads, by ring where there is one head, gathered where little is sent."""
    call = F.scaled_dot_product_attention
    for heads, few, most, same_as in (
        (4, 1, 1 << 30, "all_to_all"),
        (4, 1 << 30, 1 << 30, "gather"),
        (1, 1, 1, "ring"),
    ):
        monkeypatch.setattr(attention, "ROUND_BYTES", few)
        monkeypatch.setattr(attention, "GATHER_BYTES", most)
        right = call(*(random_tensor((1, heads, 23, 8), seed) for seed in range(3)))
        chosen, known = traced(heads, 23, 4, "auto", call), traced(heads, 23, 4, same_as, call)
        for (result, *sent), (_, *as_known) in zip(chosen, known, strict=True):
            torch.testing.assert_close(result, right, rtol=1e-10, atol=1e-10)
            assert sent == as_known, same_as


@pytest.mark.parametrize("chosen", ["all_to_all", "auto"])
def test_queries_of_the_last_step_are_refused(chosen: str) -> None:
    model = distpatch.convert_model(torch.nn.Conv2d(1, 1, 1), attention=chosen)
    with pytest.raises(distpatch.DistPatchError, match="answer those of the last step"), distpatch.displaced(model):
        pass


def test_another_way_is_refused() -> None:
    with pytest.raises(ValueError, match="attention is one of"):
        distpatch.convert_model(torch.nn.Conv2d(1, 1, 1), attention="heads")
