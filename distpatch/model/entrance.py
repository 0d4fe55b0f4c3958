"""Which tensors of a call enter sharded, and along which dim: images, or arguments that ``shard`` or a plan names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from distpatch.comm import meshes
from distpatch.tensor.options import Options
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.private import ScriptMethod
from distpatch.torch_utils.tree import leaves_in, map_tensors

PLAN = "_cp_plan"  # where a model of diffusers says how its tokens may be split among ranks
_PLACED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Split(NamedTuple):
    """``dim``: along which an argument's tensors are sharded; those of other than ``ndim`` dims are not (None: all)."""

    dim: int
    ndim: int | None = None


def is_image(tensor: Tensor) -> bool:
    return isinstance(tensor, PatchTensor) or (tensor.is_floating_point() and tensor.ndim >= 4)


@dataclass(frozen=True)
class ArgumentDims:
    """Along which dims the arguments of one call are sharded.

    ``named``: dims by id, of tensors and iterators; None: images are sharded, along ``dim``.
    """

    dim: meshes.Dims
    named: dict[int, int] | None = None

    def of(self, tensor: Tensor, source: object = None) -> meshes.Dims | None:
        """Along which dim a tensor, or one that the iterator ``source`` yields, is sharded; None: replicated."""
        if isinstance(tensor, PatchTensor):
            return tensor.row_layout.dim
        if self.named is not None:
            return self.named.get(id(tensor if source is None else source))
        return self.dim if is_image(tensor) else None


class Entrance:
    """What enters one entry point of a model.

    ``shard`` names arguments; without it, the model's own plan for context parallelism does, where it splits the first
    argument as it is given. Else images enter sharded: floating-point tensors of at least 4 dims.
    """

    def __init__(self, what: str, function: Callable[..., Any], model: nn.Module, options: Options) -> None:
        self.what, self.dim = what, options.dim
        parameters = _parameters_of(function)
        self.places = tuple(p.name for p in parameters if p.kind in _PLACED)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters if p.kind in {*_PLACED, p.KEYWORD_ONLY}}
        given = {name: Split(dim) for name, dim in options.shard or () if takes_any or name in names}
        self.is_planned = options.shard is None
        one = isinstance(options.dim, int)  # tokens have one dim: over several axes of a mesh images are sharded
        self.splits = given if not self.is_planned else _plan_of(model, self.places, names) if one else {}

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, tuple[Any, int]] | None:
        """The arguments that are sharded by name, each with its dim; None where images are."""
        if not self.splits:
            return None
        values = {**dict(zip(self.places, args)), **kwargs}
        if self.is_planned:
            first = values.get(self.places[0])
            split = self.splits.get(self.places[0])
            if split is None or not isinstance(first, Tensor) or first.ndim != split.ndim:
                return None
        found = {}
        for name, (dim, ndim) in self.splits.items():
            value = values.get(name)
            if value is not None and (ndim is None or (isinstance(value, Tensor) and value.ndim == ndim)):
                found[name] = value, dim
        return found

    def dims(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ArgumentDims:
        named = self.named(args, kwargs)
        if named is None:
            return ArgumentDims(self.dim)
        return ArgumentDims(self.dim, {id(leaf): dim for value, dim in named.values() for leaf in leaves_in(value)})

    def mapped(self, enter: Callable[[Tensor, Any], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with ``enter`` applied to what is sharded, in a form that Dynamo can trace."""
        named = self.named(args, kwargs)
        if named is None:
            return map_tensors(lambda t: enter(t, self.dim) if is_image(t) else t, (args, kwargs))

        def mapped(name: str, value: Any) -> Any:
            if name not in named:
                return value
            dim = named[name][1]
            return map_tensors(lambda t: enter(t, dim), value)

        names = (*self.places, *("" for _ in args[len(self.places) :]))
        placed = tuple(mapped(name, value) for name, value in zip(names, args))
        return placed, {name: mapped(name, value) for name, value in kwargs.items()}


def _parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """What it takes; of TorchScript, whose methods have no signature, by their schema."""
    if isinstance(function, ScriptMethod):
        names = [argument.name for argument in function.schema.arguments[1:]]  # the first is the module
        return [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    return list(inspect.signature(function).parameters.values())


def _plan_of(model: nn.Module, places: tuple[str, ...], names: set[str]) -> dict[str, Split]:
    """What a model's plan splits of these arguments; of what it splits further in, the first argument alone.

    Plans are {name of a module: {name of an argument: what has ``split_dim``, ``expected_dims``, ``split_output``}}.
    """
    plan = getattr(model, PLAN, None)
    if not isinstance(plan, dict) or not places:
        return {}
    found = dict(_splits_in(plan.get(""), names))
    for inner in plan.values():
        for name, split in _splits_in(inner, {places[0]}):
            found.setdefault(name, split)
    return found


def _splits_in(inputs: Any, names: set[str]) -> Iterator[tuple[str, Split]]:
    for name, split in inputs.items() if isinstance(inputs, dict) else ():
        dim = getattr(split, "split_dim", None)
        if name in names and dim is not None and not getattr(split, "split_output", False):
            yield name, Split(dim, getattr(split, "expected_dims", None))
