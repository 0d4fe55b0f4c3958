"""Apply a function to every tensor inside arguments and results, whatever holds them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same structure with ``fn`` applied to each tensor.

    Walks lists, tuples, named tuples, dicts and their subclasses (such as model outputs). An object
    of any other class is searched one level deep, and shallow-copied where it holds a tensor that
    ``fn`` changes (such as a diagonal Gaussian's mean). Modules are left alone.
    """
    if isinstance(tree, Tensor):
        return fn(tree)
    if torch.compiler.is_dynamo_compiling():
        return tree_map(lambda leaf: _map_leaf(fn, leaf), tree)
    if isinstance(tree, dict):
        changed = {key: map_tensors(fn, value) for key, value in tree.items()}
        if all(changed[key] is tree[key] for key in tree):
            return tree
        result = copy.copy(tree)
        for key, value in changed.items():
            result[key] = value
        return result
    if isinstance(tree, (list, tuple)):
        items = [map_tensors(fn, item) for item in tree]
        if all(new is old for new, old in zip(items, tree, strict=True)):
            return tree
        if hasattr(tree, "_fields"):
            return type(tree)(*items)
        return type(tree)(items)
    if _opaque(tree):
        return tree
    return _map_attributes(fn, tree)


def _map_attributes(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    held = {name: value for name, value in vars(tree).items() if isinstance(value, (Tensor, list, tuple, dict))}
    changed = {name: map_tensors(fn, value) for name, value in held.items()}
    if all(changed[name] is held[name] for name in held):
        return tree
    result = copy.copy(tree)
    for name, value in changed.items():
        setattr(result, name, value)
    return result


def _map_leaf(fn: Callable[[Tensor], Any], leaf: Any) -> Any:
    """A leaf of a pytree, in a form that Dynamo can trace: no object is compared or copied, but made anew."""
    if isinstance(leaf, Tensor):
        return fn(leaf)
    if _opaque(leaf):
        return leaf
    result = object.__new__(type(leaf))
    for name, value in vars(leaf).items():
        changes = isinstance(value, (Tensor, list, tuple, dict))
        setattr(result, name, map_tensors(fn, value) if changes else value)
    return result


def _opaque(value: Any) -> bool:
    if value is None or isinstance(value, (str, bytes, int, float, complex, type, torch.nn.Module)):
        return True
    return not hasattr(value, "__dict__") or callable(value)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a structure, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, tree)
    return iter(found)
