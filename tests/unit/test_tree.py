"""Tensors inside any structure."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from torch import Tensor, nn

from distpatch.torch_utils.tree import give_back, map_tensors, streams_in, tensors_in

Pair = namedtuple("Pair", "first second")
ONE, TWO = torch.tensor(1.0), torch.tensor(2.0)


@dataclass
class Box:
    content: Tensor
    label: str


@dataclass(frozen=True, slots=True)
class Sealed:
    content: Tensor


TREES: dict[str, Any] = {
    "tensor": ONE,
    "list": [ONE, "text", TWO],
    "tuple": (ONE, None, 3),
    "named tuple": Pair(ONE, TWO),
    "nested": {"a": [ONE, {"b": (TWO,)}], "c": 1.5},
    "ordered": OrderedDict(x=ONE, y=TWO),
    "model output": DecoderOutput(sample=ONE),
    "object": Box(ONE, "label"),
    "distribution": DiagonalGaussianDistribution(torch.randn(1, 4, 2, 2)),
    "frozen": Sealed(ONE),
    "in an object in an object": types.SimpleNamespace(inner=types.SimpleNamespace(y=ONE)),
    "set": {ONE},
    "deque": deque([ONE, 2], maxlen=2),
    "default dict": defaultdict(list, a=[ONE]),
    "view": {"a": ONE}.values(),
    "proxy": types.MappingProxyType({"a": ONE}),
    "partial": functools.partial(print, ONE, end=""),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_map(tree: Any) -> None:
    before = list(tensors_in(tree))
    mapped = map_tensors(lambda t: t + 1, tree)
    assert type(mapped) is type(tree)
    assert len(before) >= 1
    for old, new, kept in zip(before, tensors_in(mapped), tensors_in(tree), strict=True):
        assert torch.equal(old + 1, new)
        assert kept is old, "the original is not changed"


@pytest.mark.parametrize("tree", [*TREES.values(), None, "text", 3, [1, (2,)], nn.Conv2d(1, 1, 1)])
def test_unchanged_is_the_same_object(tree: Any) -> None:
    assert map_tensors(lambda t: t, tree) is tree


def test_what_is_not_a_tensor_stays() -> None:
    tree = {"a": ["text", 1, None], "b": Box(ONE, "label")}
    mapped = map_tensors(lambda t: t * 2, tree)
    assert mapped["a"] is tree["a"]
    assert mapped["b"].label == "label"
    assert list(mapped) == ["a", "b"]


def test_modules_are_left_alone() -> None:
    assert list(tensors_in([nn.Linear(1, 1), {"model": nn.Conv2d(1, 1, 1)}])) == []


def test_model_output_stays_consistent() -> None:
    mapped = map_tensors(lambda t: t * 2, DecoderOutput(sample=ONE))
    assert mapped.sample is mapped["sample"] is mapped[0]
    assert mapped.sample == 2


def test_sharing_cycles_and_sides() -> None:
    """What holds no tensor is left alone also beside what does; what is held twice is copied once."""
    aside: list[object] = []
    aside.append(aside)
    parent = types.SimpleNamespace(y=ONE, aside=aside)
    parent.child = types.SimpleNamespace(parent=parent, y=ONE)
    mapped = map_tensors(lambda t: t + 1, [parent, parent, aside])
    assert mapped[0] is mapped[1] is mapped[0].child.parent is not parent
    assert mapped[0].y is mapped[0].child.y == 2
    assert mapped[0].aside is mapped[2] is aside
    assert parent.child.parent is parent and parent.y is ONE


def test_depth_has_no_limit() -> None:
    tree: object = ONE
    for _ in range(5000):
        tree = [tree]
    mapped = map_tensors(lambda t: t + 1, tree)
    for _ in range(5000):
        mapped = mapped[0]
    assert mapped == 2


def test_iterators_are_left_alone_without_a_stream() -> None:
    numbers = iter([ONE])
    assert map_tensors(lambda t: t + 1, {"a": numbers})["a"] is numbers
    assert streams_in({"a": numbers}) and not streams_in({"a": [ONE]})
    assert list(map_tensors(lambda t: t, [numbers], list)[0]) == [ONE]


def test_in_place_and_given_back() -> None:
    held = {"a": [ONE, (TWO,)]}
    inner = held["a"]
    assert map_tensors(lambda t: t + 1, held, in_place=True) is held
    assert held["a"] is inner and inner == [2, (3,)]
    made: list[tuple[object, object]] = []
    x = torch.tensor(5.0)
    given = {"x": x, "list": [x], "gone": 1}
    copied = map_tensors(lambda t: t * 2, given, made=made)
    copied["list"].append("new")
    copied["more"] = copied.pop("list")
    del copied["gone"]
    kept = given["list"]
    give_back(made)
    assert given == {"x": x, "more": [x, "new"]} and given["x"] is x and given["more"] is kept
