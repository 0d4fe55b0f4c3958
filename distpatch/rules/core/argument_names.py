"""Arguments by the names and in the places that a rule has for them, whichever of torch's forms they came in."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

from distpatch.tensor.rule_table import RULES, Rule, RuleEntry, no_rule
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.private import schemas_named

_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}  # torch takes numpy's names of these too


def normal(
    entry: RuleEntry, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call as its rule takes it: names that the rule does not have become places, as torch's signature has them."""
    if func not in RULES or entry.rule is no_rule:
        return args, kwargs
    if not _NUMPY_NAMES.keys().isdisjoint(kwargs):
        kwargs = {_NUMPY_NAMES.get(key, key): value for key, value in kwargs.items()}
    taken, needed = _names(entry.rule)
    if taken >= kwargs.keys() - {"out"} and kwargs.keys() >= set(needed[len(args) :]):
        return args, kwargs
    for names in _signatures(func):
        if kwargs.keys() <= {*names, *taken, "out"}:
            return _in_places(names, args, kwargs)
    return args, kwargs


def _in_places(
    names: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    places, rest = list(args), dict(kwargs)
    for name in list(names)[len(args) :]:
        if name not in rest:
            break
        places.append(rest.pop(name))
    return tuple(places), rest


class _Any(frozenset[str]):
    """The names of a rule that takes any."""

    def __ge__(self, others: object) -> bool:
        return True


@cache
def _names(rule: Rule) -> tuple[frozenset[str], list[str]]:
    """The names that a rule has for arguments, and those of them, in order, that it must be given."""
    parameters = list(inspect.signature(rule).parameters.values())[1:]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    places = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    taken = (_Any if any_name else frozenset)(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)
    return taken, [p.name for p in places if p.default is p.empty]


@cache
def _signatures(func: Any) -> list[tuple[str, ...]]:
    """The arguments of a torch function in order, a tuple an overload."""
    if inspect.isfunction(func):
        return [tuple(inspect.signature(func).parameters)]
    schemas = schemas_named(f"aten::{op_name(func)}")
    named = [[a.name for a in schema.arguments if not a.kwarg_only] for schema in schemas]
    return [tuple("input" if name == "self" else name for name in names) for names in named]
