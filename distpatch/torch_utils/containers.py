"""One container: its children, and a new one of the same kind with other children."""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distpatch.errors import LayoutError

ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type(Ellipsis), slice, range, torch.dtype, torch.device}
    | {torch.layout, torch.memory_format, torch.Generator}
)
_OF_THREADS = frozenset({"_thread", "threading", "queue"})  # may change while they are looked into, and hold no result
_OF_RANKS = "distpatch.comm."  # leads to those of other threads
_SEALED = (type, nn.Module, BaseException, enum.Enum, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_BUILTIN: tuple[Any, ...] = (iter([]), reversed([]), iter(()), iter(set()))
_BUILTIN += (iter({}), iter({}.values()), iter({}.items()))
GENERATED: tuple[type, ...] = (
    *(types.GeneratorType, map, filter, zip, enumerate, reversed),
    *map(type, _BUILTIN),
    *(t for t in vars(itertools).values() if isinstance(t, type) and t is not itertools.count),
)


def children_of(node: Any) -> list[Any]:
    """The children of a container, in an order that all ranks share."""
    base = base_of(node)
    if base is None:
        held: list[Any] = []
    elif base in {set, frozenset}:
        held = in_order(node)
    elif base in {list, tuple, deque}:
        held = list(base.__iter__(node))
    else:
        held = [item for pair in base.items(node) for item in pair]
    if type(node) in _VIEWS:
        held = [item for pair in node.mapping.items() for item in pair]
    elif isinstance(node, types.MappingProxyType):
        held = [item for pair in node.items() for item in pair]
    elif isinstance(node, functools.partial):
        held = [node.func, *node.args, *node.keywords.values()]
    elif isinstance(node, types.MethodType):
        held = [node.__self__]
    elif isinstance(node, types.FunctionType):
        held = [value for cell in node.__closure__ or () if (value := _in_cell(cell)) is not None]
    known = {id(item) for item in held} if held else ()
    return held + [value for _, _, value in attributes_of(node) if id(value) not in known]  # a model output has both


def is_fixed(node: Any) -> bool:
    """Whether the container is immutable."""
    return isinstance(node, (tuple, frozenset, types.MappingProxyType, *_VIEWS, functools.partial))


def remade(node: Any, build: Callable[[Any], Any]) -> Any:
    """An immutable container of the same kind with new children."""
    kind = type(node)
    if isinstance(node, tuple):
        items = [build(item) for item in tuple.__iter__(node)]
        if hasattr(kind, "n_fields"):  # torch.return_types, os.stat_result
            return kind(items)
        return tuple.__new__(kind, items)
    if isinstance(node, frozenset):
        return frozenset.__new__(kind, [build(item) for item in in_order(node)])
    if isinstance(node, functools.partial):
        keywords = {key: build(value) for key, value in node.keywords.items()}
        return kind(build(node.func), *map(build, node.args), **keywords)
    mapping = {build(key): build(value) for key, value in getattr(node, "mapping", node).items()}
    if isinstance(node, types.MappingProxyType):
        return types.MappingProxyType(mapping)
    return (mapping.keys, mapping.values, mapping.items)[_VIEWS.index(kind)]()


def shallow(node: Any) -> Any:
    """A shallow copy, without calling the constructor."""
    kind, base = type(node), base_of(node)
    if kind is base and kind is not defaultdict:
        return kind(node) if kind is not deque else deque(node, node.maxlen)
    if isinstance(node, deque):
        return copy.copy(node)
    try:
        new = (base or object).__new__(kind)
    except TypeError:  # partly made of something that is not Python's
        return copy.copy(node)
    if base is list:
        list.extend(new, list.__iter__(node))
    elif base is set:
        set.update(new, set.__iter__(node))
    elif base is not None:
        for key, value in base.items(node):
            base.__setitem__(new, key, value)
        if base is defaultdict:
            new.default_factory = node.default_factory
    for slot, name, value in attributes_of(node):
        _set_attribute(new, slot, name, value)
    return new


_BASES = (OrderedDict, defaultdict, dict, list, tuple, set, frozenset, deque)


def base_of(node: Any) -> Any:
    """The container class of the standard library that it derives from."""
    kind = type(node)
    return kind if kind in _BASES else next((base for base in _BASES if isinstance(node, base)), None)


@functools.lru_cache(maxsize=4096)
def _slots(kind: Any) -> tuple[Any, ...]:
    return tuple(
        value
        for cls in kind.__mro__
        if "__slots__" in vars(cls)
        for value in vars(cls).values()
        if isinstance(value, types.MemberDescriptorType)
    )


def attributes_of(node: Any) -> list[tuple[Any, str, Any]]:
    """An object's ``__dict__`` (or None) and its slot descriptors."""
    held = [(None, name, value) for name, value in vars(node).items()] if type(node).__dictoffset__ else []
    kind: Any = type(node)
    for slot in _slots(kind):
        try:
            held.append((slot, slot.__name__, slot.__get__(node)))
        except AttributeError:  # empty
            continue
    return held


@functools.lru_cache(maxsize=4096)
def is_sealed(kind: Any, modules: bool) -> bool:
    """Whether objects of this class are never looked into."""
    if kind in ATOMS:
        return True
    if modules and issubclass(kind, (nn.Module, types.FunctionType, types.MethodType)):
        return False
    if issubclass(kind, _SEALED) or issubclass(kind, types.MethodType):
        return True
    if kind.__module__.partition(".")[0] in _OF_THREADS or kind.__module__.startswith(_OF_RANKS):
        return True
    known = (*_BASES, *_VIEWS, types.MappingProxyType, functools.partial)
    return not (issubclass(kind, known) or kind.__dictoffset__ or _slots(kind))


def in_order(items: Any) -> list[Any]:
    """The items of a set in an order that all ranks share.

    Raises ``LayoutError`` where sharded tensors of one set cannot be told apart: gathers must run in the same order.
    """
    listed = list(type(items).__iter__(items))
    if len(listed) < 2 or all(type(item) in ATOMS for item in listed):
        return listed
    named = sorted(((_name(item), item) for item in listed), key=lambda pair: pair[0])
    for (one, item), (other, _) in itertools.pairwise(named):
        if one == other and any(hasattr(t, "row_layout") for t in _tensors_under(item)):
            raise LayoutError(
                f"a set holds several sharded tensors alike ({one}), in an order of each rank's own: use a list"
            )
    return [item for _, item in named]


def _name(item: Any) -> str:
    tensors = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in _tensors_under(item))
    return f"{type(item).__name__} of {tensors}" if tensors else f"{type(item).__name__} {item!r:.80}"


def _tensors_under(item: Any) -> Iterator[Tensor]:
    seen: set[int] = set()
    waiting = [item]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Tensor):
            yield node
            continue
        kind: Any = type(node)
        if id(node) not in seen and not is_sealed(kind, False):
            seen.add(id(node))
            waiting += reversed(children_of(node))


def _in_cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _set_cell(cell: Any, build: Callable[[Any], Any]) -> None:
    value = _in_cell(cell)
    if value is not None and (made := build(value)) is not value:
        cell.cell_contents = made


def refill(node: Any, new: Any, build: Callable[[Any], Any]) -> None:
    """Write ``build(child)`` for each child of ``node`` into ``new``, at the same place."""
    base = base_of(node)
    if base in {list, deque}:
        for i, item in enumerate(list(base.__iter__(node))):
            base.__setitem__(new, i, build(item))
    elif base is set:
        items = [build(item) for item in in_order(node)]
        set.clear(new)
        set.update(new, items)
    elif base not in {None, tuple, frozenset}:
        old = list(base.items(node))
        pairs = [(build(key), build(value)) for key, value in old]
        if any(key is not other for (key, _), (other, _) in zip(pairs, old)):
            base.clear(new)
        for key, value in pairs:
            base.__setitem__(new, key, value)
    elif isinstance(node, types.FunctionType):
        for cell in node.__closure__ or ():
            _set_cell(cell, build)
    for slot, name, value in attributes_of(node):
        if (made := build(value)) is not value or new is not node:
            _set_attribute(new, slot, name, made)


def copy_back(node: Any, new: Any, back: Callable[[Any], Any]) -> None:
    """Write what the copy holds by now back to ``node``, each item mapped by ``back``."""
    base = base_of(node)
    if base in {list, deque, set}:
        items = list(map(back, base.__iter__(new)))
        if not _same(items, list(base.__iter__(node))):
            base.clear(node)
            (set.update if base is set else base.extend)(node, items)
    elif base is not None:
        pairs = [(back(key), back(value)) for key, value in base.items(new)]
        if not _same(itertools.chain(*pairs), itertools.chain(*base.items(node))):
            base.clear(node)
            for key, value in pairs:
                base.__setitem__(node, key, value)
    held = {(slot, name): back(value) for slot, name, value in attributes_of(new)}
    before = {(slot, name): value for slot, name, value in attributes_of(node)}
    for (slot, name), value in held.items():
        if before.get((slot, name), held) is not value:
            _set_attribute(node, slot, name, value)
    for slot, name in before.keys() - held.keys():
        if slot is None:
            del node.__dict__[name]
        else:
            slot.__delete__(node)


def _set_attribute(node: Any, slot: Any, name: str, value: Any) -> None:
    """Set an attribute past any ``__setattr__`` that forbids or observes it."""
    if slot is None:
        node.__dict__[name] = value
    else:
        slot.__set__(node, value)


def _same(some: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(one is other for one, other in itertools.zip_longest(some, others))
