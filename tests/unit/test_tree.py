"""Tensors inside any structure."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from torch import Tensor, nn

from distpatch.tree import map_tensors, tensors_in

Pair = namedtuple("Pair", "first second")
ONE, TWO = torch.tensor(1.0), torch.tensor(2.0)


@dataclass
class Box:
    content: Tensor
    label: str


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
