"""Apply a function to every tensor inside arguments and results, whatever holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from distpatch.torch_utils.containers import (
    ATOMS,
    GENERATED,
    attributes_of,
    children_of,
    copy_back,
    is_fixed,
    is_sealed,
    refill,
    remade,
    shallow,
)
from distpatch.torch_utils.private import tree_map

Made = list[tuple[Any, Any]]


def map_tensors(
    fn: Callable[[Tensor], Any],
    tree: Any,
    stream: Callable[[Iterator[Any]], Any] | None = None,
    *,
    made: Made | None = None,
    in_place: bool = False,
    modules: bool = False,
) -> Any:
    """The same structure with ``fn`` applied to each tensor, once to each, in order.

    Walks containers of the standard library and their subclasses (model outputs, named tuples), and the attributes
    and slots of objects of any other class, frozen ones too, to any depth; cycles end. What holds a tensor that
    ``fn`` changes is copied, the rest stays the same object; what was shared is shared. ``in_place``: nothing is
    copied that can be written to. Modules, functions and classes are left alone; ``modules``: modules, bound methods
    and what functions have closed over are walked too.

    ``stream``: what becomes of a generator or a builtin iterator, which would be consumed by looking into it; without
    it they are left alone. ``made`` takes pairs of what was replaced, tensors and containers, and what by.
    """
    if isinstance(tree, Tensor):
        return fn(tree)
    kind = type(tree)
    if kind in ATOMS:
        return tree
    if torch.compiler.is_dynamo_compiling():
        return tree_map(lambda leaf: _map_leaf(fn, leaf), tree)
    if (kind is tuple or kind is list) and made is None and not in_place and _is_flat(tree):  # as most are
        known: dict[int, Any] = {}
        items = [_once(fn, item, known) if isinstance(item, Tensor) else item for item in tree]
        return tree if all(new is old for new, old in zip(items, tree)) else kind(items)
    graph = _Graph(tree, in_place, modules)
    for leaf in graph.leaves:
        if id(leaf) not in graph.new:
            new = fn(leaf) if isinstance(leaf, Tensor) else leaf if stream is None else stream(leaf)
            graph.replace(leaf, new)
    result = graph.rebuilt()
    if made is not None:
        made += graph.made
    return result


def _is_flat(items: Any) -> bool:
    return all(isinstance(item, Tensor) or type(item) in ATOMS for item in items)


def _once(fn: Callable[[Tensor], Any], tensor: Tensor, known: dict[int, Any]) -> Any:
    if id(tensor) not in known:
        known[id(tensor)] = fn(tensor)
    return known[id(tensor)]


def tensors_in(tree: Any, *, modules: bool = False) -> Iterator[Tensor]:
    """Every tensor of a structure, in order, as often as it is there; ``modules`` as in ``map_tensors``."""
    if isinstance(tree, Tensor):
        return iter((tree,))
    if type(tree) in ATOMS:
        return iter(())
    if torch.compiler.is_dynamo_compiling():
        found: list[Tensor] = []
        map_tensors(found.append, tree)
        return iter(found)
    return (leaf for leaf in _Graph(tree, False, modules).leaves if isinstance(leaf, Tensor))


def leaves_in(tree: Any) -> list[Any]:
    """Every tensor, generator and builtin iterator of a structure."""
    return list(tensors_in(tree)) if torch.compiler.is_dynamo_compiling() else _Graph(tree, False, False).leaves


def streams_in(tree: Any) -> bool:
    """Whether a structure holds a generator or a builtin iterator."""
    return any(not isinstance(leaf, Tensor) for leaf in _Graph(tree, False, False).leaves)


def give_back(made: Made) -> None:
    """Write what was written to the copies made by ``map_tensors`` back to the containers they were made of."""
    old = {id(new): before for before, new in made}

    def back(item: Any) -> Any:
        return old.get(id(item), item)

    for before, new in made:
        if not (isinstance(before, (Tensor, *GENERATED)) or is_fixed(before)):
            copy_back(before, new, back)


class _Graph:
    """The object graph of a structure: every container once, every leaf (tensor or iterator) at each of its places."""

    def __init__(self, root: Any, in_place: bool, modules: bool) -> None:
        self.root, self.in_place = root, in_place
        self.leaves: list[Any] = []
        self.new: dict[int, Any] = {}  # of leaves and containers, by the id of the old one
        self.made: Made = []
        self.holders: dict[int, list[Any]] = {}
        self.changed: set[int] = set()
        self.unfilled: list[tuple[Any, Any]] = []
        self.seen: dict[int, Any] = {}
        waiting = [root]
        while waiting:
            node = waiting.pop()
            if isinstance(node, (Tensor, *GENERATED)):
                self.leaves.append(node)
                continue
            kind: Any = type(node)
            if id(node) in self.seen or is_sealed(kind, modules):
                continue
            self.seen[id(node)] = node
            children = [child for child in children_of(node) if type(child) not in ATOMS]
            for child in children:
                self.holders.setdefault(id(child), []).append(node)
            waiting += reversed(children)

    def replace(self, old: Any, new: Any) -> None:
        self.new[id(old)] = new
        if new is not old:
            self.made.append((old, new))

    def rebuilt(self) -> Any:
        reached = [old for old, _ in self.made]
        while reached:
            for holder in self.holders.get(id(reached.pop()), ()):
                if id(holder) not in self.changed:
                    self.changed.add(id(holder))
                    reached.append(holder)
        result = self.build(self.root)
        while self.unfilled:
            refill(*self.unfilled.pop(), self.build)
        return result

    def build(self, node: Any) -> Any:
        """The new node. What can be written to is filled later, so that cycles end."""
        if id(node) in self.new:
            return self.new[id(node)]
        if id(node) not in self.changed:
            return node
        if is_fixed(node):
            new = remade(node, self.build)
            fill = isinstance(node, tuple) and bool(attributes_of(node))
        else:
            new, fill = node if self.in_place else shallow(node), True
        if fill:
            self.unfilled.append((node, new))
        self.replace(node, new)
        return new


def _map_leaf(fn: Callable[[Tensor], Any], leaf: Any) -> Any:
    """A leaf of a pytree, in a form that Dynamo can trace: rebuilt, without comparing or copying objects."""
    if isinstance(leaf, Tensor):
        return fn(leaf)
    if _opaque(leaf):
        return leaf
    result = object.__new__(type(leaf))
    for name, value in vars(leaf).items():
        changes = isinstance(value, (Tensor, list, tuple, dict))
        object.__setattr__(result, name, map_tensors(fn, value) if changes else value)
    return result


def _opaque(value: Any) -> bool:
    if value is None or isinstance(value, (str, bytes, int, float, complex, type, torch.nn.Module)):
        return True
    return not hasattr(value, "__dict__") or callable(value)
