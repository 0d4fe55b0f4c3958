"""``convert_model(shard=...)``: models of tokens, whose arguments are sharded by name or as their own plan says."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from distpatch import PatchTensor
from tests.support import oracle
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks

BY_NAME = {"hidden_states": 1, "ids": 0}
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@dataclass(frozen=True)
class Split:
    """As ``ContextParallelInput`` of diffusers."""

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False


class Joint(nn.Module):
    """Image and text tokens that attend to each other, with a rotary embedding and a mask of the text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.out = nn.Linear(4, 24), nn.Linear(6, 24), nn.Linear(8, 4)
        self.double()

    def forward(
        self, hidden_states: Tensor, text: Tensor, ids: Tensor, mask: Tensor | None = None, extra: Any = None
    ) -> dict[str, Tensor]:
        angles = torch.cat([ids.new_zeros(text.shape[1], 4), ids[:, :1] * torch.arange(1, 5)])
        query, key, value = (
            torch.cat(parts, 1).unflatten(-1, (2, 4)).transpose(1, 2)
            for parts in zip(self.text(text).chunk(3, -1), self.image(hidden_states).chunk(3, -1))
        )
        query, key = query * angles.cos(), key * angles.sin()
        seen = None if mask is None else F.pad(mask, (0, hidden_states.shape[1]), value=True)[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, seen).transpose(1, 2).flatten(2)
        words, image = mixed.split([text.shape[1], hidden_states.shape[1]], 1)
        result = {"image": self.out(image), "text": self.out(words)}
        for more in extra or ():
            result["image"] = result["image"] + more
        return result


class Planned(Joint):
    _cp_plan: ClassVar[Any] = {
        "": {"text": Split(1, 3), "ids": Split(0, 2), "mask": Split(1, 2), "absent": Split(0)},
        "block.0": {"hidden_states": Split(1, 3), "text": Split(0, 3)},
        "rope": {0: Split(0, 2, split_output=True)},
        "proj_out": Split(1),
    }


def arguments(tokens: int = 7) -> dict[str, Any]:
    mask = torch.tensor([[True, True, False, True], [True] * 4])
    return {
        "hidden_states": random_tensor((2, tokens, 4)),
        "text": random_tensor((2, 4, 6), 1),
        "ids": random_tensor((tokens, 2), 2),
        "mask": mask,
    }


def on_ranks(model: nn.Module, body: Callable[[Any], Any], world: int = 3, **options: Any) -> list[Any]:
    def rank_main(rank: int) -> Any:
        settings = {"fallback": "error", **options}
        return body(distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD, **settings))

    return run_ranks(world, rank_main)


@pytest.mark.parametrize("tokens", [7, 2])
@pytest.mark.parametrize(
    "shard",
    [BY_NAME, {"hidden_states": -2, "ids": 0, "text": 1, "mask": 1}, {"hidden_states": 0, "text": 0}, {"ids": 0}],
    ids=str,
)
def test_by_name(shard: dict[str, int], tokens: int) -> None:
    model, given = Joint(), arguments(tokens)
    leaves = [given["hidden_states"].requires_grad_(), given["text"].requires_grad_(), *model.parameters()]
    right = model(**given)
    wanted = torch.autograd.grad(sum(t.square().sum() for t in right.values()), leaves)

    def body(converted: Any) -> Any:
        mine = arguments(tokens)
        own = [mine["hidden_states"].requires_grad_(), mine["text"].requires_grad_(), *converted.parameters()]
        results = converted(mine["hidden_states"], mine["text"], ids=mine["ids"], mask=mine["mask"])
        gradients = torch.autograd.grad(sum(t.square().sum() for t in results.values()), own)
        with torch.no_grad():
            return results, gradients, converted(**mine)

    for world in (1, 2, 3, 4):
        for results, gradients, again in on_ranks(model, body, world, shard=shard):
            for name, value in right.items():
                torch.testing.assert_close(results[name], value, **TOLERANCE)
                torch.testing.assert_close(again[name], value, **TOLERANCE)
            torch.testing.assert_close(list(gradients), list(wanted), **TOLERANCE)
        oracle.compared += 1


def test_the_result_stays_sharded_along_its_dim() -> None:
    model, given = Joint(), arguments()
    right = model(**given)

    def body(converted: Any) -> Any:
        result = converted(**given)
        assert isinstance(result["image"], PatchTensor)
        assert result["image"].row_layout.dim == 1
        again = converted(result["image"].detach(), given["text"], given["ids"])  # into the next call as it is
        return distpatch.gather(result["image"]), result["image"].local.shape[1], distpatch.gather(again["image"])

    ranks = on_ranks(model, body, shard=BY_NAME, output="shard")
    assert [tokens for _, tokens, _ in ranks] == [0, 4, 3]  # of 4 + 7 tokens that attended, the first rank has the text
    then = model(right["image"], given["text"], given["ids"])["image"]
    for image, _, again in ranks:
        torch.testing.assert_close(image, right["image"], **TOLERANCE)
        torch.testing.assert_close(again, then, **TOLERANCE)


def test_on_rank_0_alone() -> None:
    given = arguments()
    first, *others = on_ranks(Joint(), lambda model: model(**given)["image"], shard=BY_NAME, output="rank0")
    torch.testing.assert_close(first, Joint()(**given)["image"].detach(), **TOLERANCE)
    assert others == [None, None]


def entered(model: Any, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Which arguments are sharded, and along which dim."""
    seen: dict[str, int] = {}
    forward = model.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(("hidden_states", "text", "ids", "mask"), args)), **kwargs}
        seen.update({name: x.row_layout.dim for name, x in given.items() if isinstance(x, PatchTensor)})
        return forward(*args, **kwargs)

    model.forward = watched
    distpatch.convert_model(model)(*args, **kwargs)
    return seen


def test_as_the_plan_of_the_model_says() -> None:
    given = arguments()
    assert entered(Planned(), **given) == {"hidden_states": 1, "text": 1, "ids": 0, "mask": 1}
    right = Planned()(**given)
    for result in on_ranks(Planned(), lambda model: model(**given)):
        torch.testing.assert_close(result["image"], right["image"], **TOLERANCE)
    del given["mask"]
    assert entered(Planned(), *given.values()) == {"hidden_states": 1, "text": 1, "ids": 0}
    other = {**given, "ids": given["ids"][:, :, None]}  # of other dims than the plan is for
    assert entered(Ids(), **other) == {"hidden_states": 1, "text": 1}


class Ids(Planned):
    def forward(self, hidden_states: Tensor, text: Tensor, ids: Tensor, mask: Any = None, extra: Any = None) -> Any:
        return super().forward(hidden_states, text, ids.squeeze(-1), mask, extra)


class Images(nn.Module):
    """A plan that is of its tokens, and not of the images that it takes."""

    _cp_plan: ClassVar[Any] = {"": {"timestep": Split(1, 2)}, "block.0": {"hidden_states": Split(1, 3)}}

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        assert isinstance(hidden_states, PatchTensor) and hidden_states.row_layout.dim == 2
        assert not isinstance(timestep, PatchTensor)
        return hidden_states * timestep.sum()


def test_images_are_sharded_whatever_the_plan_says_of_tokens() -> None:
    x, timestep = random_tensor((1, 3, 5, 4)), random_tensor((1, 6), 1)
    for result in on_ranks(Images(), lambda model: model(x, timestep)):
        torch.testing.assert_close(result, x * timestep.sum())


def test_lists_and_generators_of_tensors() -> None:
    given, more = arguments(), [random_tensor((2, 7, 4), 5), random_tensor((2, 7, 4), 6)]
    right = Joint()(**given, extra=more)["image"].detach()

    class Counted(Joint):
        def forward(self, *args: Any, extra: Any = None, **kwargs: Any) -> Any:
            extra = list(extra)
            assert all(isinstance(item, PatchTensor) and item.row_layout.dim == 1 for item in extra)
            return super().forward(*args, extra=extra, **kwargs)

    def yielded() -> Iterator[Tensor]:
        yield from more

    for extra in (lambda: more, yielded):
        for result in on_ranks(Counted(), lambda model: model(**given, extra=extra()), shard={"extra": 1, **BY_NAME}):
            torch.testing.assert_close(result["image"], right, **TOLERANCE)


def refused(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    options = kwargs.pop("options", {"shard": BY_NAME})

    def body(converted: Any) -> str:
        with pytest.raises(distpatch.LayoutError) as error:
            converted(*args, **kwargs)
        return str(error.value)

    first, *others = on_ranks(model, body, **options)
    assert set(others) == {first}
    return first


def test_errors_name_the_argument_and_what_to_do() -> None:
    given = arguments()
    text = refused(Joint(), **{**given, "ids": torch.tensor(1.0)})
    assert "Joint.forward: argument 'ids' of shape () cannot be sharded along dim 0" in text
    text = refused(Joint(), **given, options={"shard": {"hidden_states": 3}})
    assert "'hidden_states' of shape (2, 7, 4) cannot be sharded along dim 3: say one of its dims -3..2" in text
    assert "shard={'hidden_states': ...}" in text
    text = refused(Joint(), None, given["text"], None)
    assert "none that shard= names (hidden_states, ids) was given a tensor" in text
    assert "(2, 4, 6) torch.float64" in text
    text = refused(Joint(), **given, options={})
    assert "no argument can be sharded" in text
    assert 'Tokens (B, N, C): convert_model(..., shard={"hidden_states": 1})' in text


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (
            {"hidden": 1},
            "shard= names 'hidden', which is no argument of the model: Joint.forward takes hidden_states, text",
        ),
        ({"ids": "0"}, "shard names arguments, each with a dim"),
        ({}, "shard names arguments, each with a dim"),
    ],
)
def test_what_cannot_be_meant_is_refused(shard: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        distpatch.convert_model(Joint(), shard=shard)


def test_ranks_must_name_the_same() -> None:
    joint = Joint()

    def body(rank: int) -> None:
        with pytest.raises(distpatch.RankError, match="shard="):
            distpatch.convert_model(copy.deepcopy(joint), dist.group.WORLD, shard={"hidden_states": rank})

    run_ranks(2, body)


def test_torchscript() -> None:
    class Mixed(nn.Module):
        def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
            return torch.softmax(hidden_states @ text.transpose(1, 2), 1)

    given = random_tensor((2, 7, 4)), random_tensor((2, 3, 4), 1)
    for script in (torch.jit.script(Mixed()), torch.jit.trace(Mixed(), given)):

        def body(rank: int, script: Any = script) -> Tensor:
            model = distpatch.convert_model(
                copy.deepcopy(script), dist.group.WORLD, shard={"text": 1, "hidden_states": 1}
            )
            with distpatch.trace() as t:
                result = model(given[0], text=given[1])
            assert sum(record.kind == "p2p" for record in t.records) > 0
            return result

        for result in run_ranks(2, body):
            torch.testing.assert_close(result, Mixed()(*given))


def test_what_is_written_to_an_argument_is_seen() -> None:
    class Written(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            hidden_states[:, 1:] += 1
            return hidden_states.sum(1)

    right = random_tensor((2, 5, 3))
    wanted = Written()(right)

    def body(converted: Any) -> tuple[Tensor, Tensor]:
        mine = random_tensor((2, 5, 3))
        return converted(mine), mine

    for result, mine in on_ranks(Written(), body, shard={"hidden_states": 1}):
        torch.testing.assert_close(result, wanted)
        torch.testing.assert_close(mine, right)


def test_small_calls_whole() -> None:
    given = arguments()
    right = Joint()(**given)["image"].detach()

    def body(converted: Any) -> Any:
        with torch.no_grad():
            return [distpatch.gather(converted(**given)["image"]) for _ in range(12)]

    for output in ("gather", "shard"):
        for results in on_ranks(Joint(), body, 2, shard=BY_NAME, policy="auto", output=output):
            for result in results:
                torch.testing.assert_close(result, right, **TOLERANCE)


def test_guidance_on_two_halves() -> None:
    given, joint = arguments(), Joint()
    right = joint(**given)["image"].detach()

    def body(rank: int) -> Tensor:
        mesh = distpatch.guidance_mesh()
        model = distpatch.split_guidance(copy.deepcopy(joint), mesh, shard=BY_NAME, fallback="error")
        with torch.no_grad():
            return model(**given)["image"]

    for result in run_ranks(4, body):
        torch.testing.assert_close(result, right, **TOLERANCE)


def test_planned_on_fake_tensors() -> None:
    given = arguments(64)
    plan = distpatch.plan(Joint(), **given, world_size=4, device="cpu", options={"shard": BY_NAME})
    assert plan.shapes == ((2, 64, 4), (64, 2))
    assert [rank.rows for rank in plan.ranks] == [16] * 4
    found = distpatch.plan(Planned(), **given, world_size=4, device="cpu")
    assert [rank.rows for rank in found.ranks] == [16] * 4
