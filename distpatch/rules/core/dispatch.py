"""A call of a torch function that meets a sharded tensor: which rule it gets, and what is seen to around it.

Before the rule: deferred rows that read what the call writes to are computed, arguments get the names that the rule
has, ``out=`` is put aside. After it: where the rule does not apply the arguments are gathered (fallback.py); results
stand in memory as on one device (memory_order.py).
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.layout.rows import RowLayout
from distpatch.lazy.buffer_reuse import pending
from distpatch.rules.core.aliasing import before_writing, may_write, mutates, protect, through
from distpatch.rules.core.fallback import computed_on_all, fallback
from distpatch.rules.core.inner_axes import beside_no_rows
from distpatch.rules.core.memory_order import as_on_one_device
from distpatch.rules.core.operands import PLAIN
from distpatch.rules.core.out_argument import into
from distpatch.rules.core.redistribution import in_order
from distpatch.rules.core.wrapping import wrap
from distpatch.tensor.axes import as_seen_by_outermost
from distpatch.tensor.halo_rows import let_go, live
from distpatch.tensor.patch_tensor import BlockTensor, PatchCopy, PatchTensor
from distpatch.tensor.region import meshes
from distpatch.tensor.row_copy import refuse_forward_mode
from distpatch.tensor.rule_table import RULES, Rule, RuleEntry, no_rule
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.private import forward_mode_level, schemas_named
from distpatch.torch_utils.tree import map_tensors, tensors_in

_NO_TENSORS = frozenset({type(None), int, float, bool, str, tuple})
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}  # torch takes numpy's names of these too


class _Dispatcher:
    """What the tensors call (tensor/patch_tensor.py)."""

    def on_rows(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """A call on sharded tensors."""
        if forward_mode_level() >= 0:
            refuse_forward_mode(op_name(func))
        if meshes.some:
            args, kwargs = as_seen_by_outermost(args, kwargs)
        entry = RULES[func]
        if (pending.rows or live.some) and (
            may_write(func) or (kwargs and (kwargs.get("out") is not None or kwargs.get("inplace")))
        ):
            before_writing(func, args, kwargs or {})
            let_go(args[0] if entry.elementwise and args and not (kwargs and "out" in kwargs) else None)
        if kwargs and entry.elementwise and "out" not in kwargs:  # whose rule takes all names as they are
            result = entry.rule(func, *args, **kwargs)
        elif kwargs or entry.asks_if_empty:
            kwargs = kwargs or {}
            result = _applied(entry, func, args, kwargs)
            if kwargs.get("out") is not None:
                return result
        else:
            result = entry.rule(func, *args)
            if result is NotImplemented and not entry.elementwise:
                result = fallback(func, *args)
        kind = type(result)
        if kind is PatchTensor or kind is PatchCopy:
            if result.row_layout.is_tiny or (entry.of_many_kernels and not _are_in_order(func, args, kwargs)):
                return as_on_one_device(entry, func, args, kwargs or {}, result)
        elif (
            issubclass(kind, (tuple, list))
            and result
            and type(result[0]) is PatchTensor
            and result[0].row_layout.is_tiny
        ):
            return as_on_one_device(entry, func, args, kwargs or {}, result)
        return result

    def on_blocks(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on rows in blocks: on the rows as they are, where the rule treats all alike, else in order."""
        if meshes.some:
            seen = as_seen_by_outermost(args, kwargs)
            if seen[0] is not args or seen[1] is not kwargs:  # the blocks may be no longer among them
                return func(*seen[0], **seen[1])
        if pending.rows or live.some:
            before_writing(func, args, kwargs)
            if mutates(func, args, kwargs) is not None:
                let_go()
        if (stand_in := RULES.stand_in(func)) is not None:  # what it calls comes here by itself
            return stand_in(*args, **kwargs)
        entry = RULES[func]
        if _is_any_order(entry, func, args, kwargs):
            return _applied(entry, func, args, kwargs)
        if entry.order_free and kwargs.get("out") is None and _is_order_free(entry, func, args, kwargs):
            return _as_if_in_order(func, args, kwargs)
        written = [t for t in tensors_in(mutates(func, args, kwargs)) if isinstance(t, BlockTensor)]
        if written:
            return _written_back(func, args, kwargs, written)
        source = next(t for t in tensors_in((args, kwargs)) if isinstance(t, BlockTensor))
        args, kwargs = map_tensors(in_order, args), map_tensors(in_order, kwargs)
        result = func(*args, **kwargs)
        return protect(func, source, result, args) if source.row_layout.size else result

    def on_copies(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on copies of rows that are views on one device."""
        if live.some and mutates(func, args, kwargs) is not None:
            let_go()
        if (stand_in := RULES.stand_in(func)) is not None:
            return stand_in(*args, **kwargs)
        return through(func, args, kwargs)


def _is_any_order(entry: RuleEntry, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the rule treats all rows of this call alike."""
    if not callable(entry.any_order):
        return entry.any_order
    places, named = _normal(entry, func, args, kwargs)
    return entry.any_order(*places, **named)


def _is_order_free(entry: RuleEntry, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether one argument alone is sharded, and where its rows stand makes no difference to the call."""
    if sum(isinstance(t, PatchTensor) for t in tensors_in((args, kwargs))) > 1:
        return False
    places, named = _normal(entry, func, args, kwargs)
    return entry.order_free(*places, **named) if callable(entry.order_free) else entry.order_free


def _as_if_in_order(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call on the rows as a rank holds them; what is sharded as they are is in the same blocks."""
    blocks = next(t.row_layout for t in tensors_in((args, kwargs)) if isinstance(t, BlockTensor))
    bounds = blocks.held

    def rows(tensor: Tensor) -> Tensor:
        return wrap(tensor.local, tensor, RowLayout(blocks.dim, bounds)) if isinstance(tensor, BlockTensor) else tensor

    def in_blocks(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, PatchTensor) or tensor.row_layout.bounds != bounds:
            return tensor
        return wrap(tensor.local, tensor, blocks.with_dim(tensor.row_layout.dim))

    return map_tensors(in_blocks, func(*map_tensors(rows, args), **map_tensors(rows, kwargs)))


def _written_back(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Any]) -> Any:
    """A call that writes to rows in blocks, on copies in order, of which ``written`` get what was written."""
    copies = {id(t): in_order(t) for t in tensors_in((args, kwargs)) if isinstance(t, BlockTensor)}
    args, kwargs = map_tensors(lambda t: copies.get(id(t), t), (args, kwargs))
    result = func(*args, **kwargs)
    for tensor in written:
        if copies[id(tensor)].shape != tensor.shape:
            raise UnsupportedOpError(
                f"{op_name(func)} would change the shape of {tensor!r}, whose rows are merged with a dim in front of "
                "them. Use the out-of-place form."
            )
        tensor.copy_(copies[id(tensor)])
    originals = {id(copies[id(tensor)]): tensor for tensor in written}
    return map_tensors(lambda t: originals.get(id(t), t), result)


def _are_in_order(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    """Whether all arguments stand in the order of their dims: then so does the result, by any kernel."""
    if func is F.scaled_dot_product_attention:  # by some, heads stand behind tokens
        return False
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if type(arg) in _NO_TENSORS or not isinstance(arg, Tensor):
            continue
        rows = arg.local_or_recipe if isinstance(arg, PatchTensor) else arg
        if isinstance(rows, Tensor):  # of others than plain ones, sizes may be symbols
            if type(rows) not in PLAIN or not _fall(rows.stride()):
                return False
        elif rows.format is not torch.contiguous_format:
            return False
    return True


@lru_cache(maxsize=4096)
def _fall(strides: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in pairwise(strides))


def _applied(entry: RuleEntry, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the rule makes of a call; where it does not apply, or has nothing to say of no elements, what torch does."""
    places, named = _normal(entry, func, args, kwargs)
    if "out" in named:
        if not (entry.elementwise or entry.rule is no_rule) and named["out"] is not None:
            return into(func, places, named)
        if named["out"] is None:
            named = {key: value for key, value in named.items() if key != "out"}
    if entry.asks_if_empty and places and isinstance(places[0], PatchTensor) and 0 in places[0].shape:
        return (beside_no_rows if places[0].region.level else computed_on_all)(func, places, named)
    result = entry.rule(func, *places, **named)
    return fallback(func, *args, **kwargs) if result is NotImplemented and not entry.elementwise else result


def _normal(
    entry: RuleEntry, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call as its rule takes it: names that the rule does not have become places, as torch's signature has them."""
    form = _form(func, entry.rule, len(args), tuple(kwargs)) if kwargs and func in RULES else None
    if form is None:
        return args, kwargs
    places, names = form
    return (*args, *(kwargs[name] for name in places)), {new: kwargs[name] for new, name in names}


@lru_cache(maxsize=4096)
def _form(
    func: Any, rule: Rule, count: int, given: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]] | None:
    """Of arguments given by name, those that become places, and (its name in the rule, the name) of the others.

    None where the rule takes them as they are.
    """
    if rule is no_rule:
        return None
    names = {_NUMPY_NAMES.get(name, name): name for name in given}
    parameters = list(inspect.signature(rule).parameters.values())[1:]
    places = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    taken = {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL} | {"out"}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        taken |= names.keys()
    moved: list[str] = []
    if not (taken >= names.keys() >= set(places[count:])):
        orders = (order for order in _signatures(func) if names.keys() <= {*order, *taken})
        moved = list(takewhile(names.__contains__, next(orders, ())[count:]))
    if not moved and all(new == name for new, name in names.items()):
        return None
    return tuple(names[new] for new in moved), tuple(pair for pair in names.items() if pair[0] not in moved)


def _signatures(func: Any) -> list[tuple[str, ...]]:
    """The arguments of a torch function in order, a tuple an overload."""
    if inspect.isfunction(func):
        return [tuple(inspect.signature(func).parameters)]
    schemas = schemas_named(f"aten::{op_name(func)}")
    named = [[a.name for a in schema.arguments if not a.kwarg_only] for schema in schemas]
    return [tuple("input" if name == "self" else name for name in names) for names in named]


RULES.dispatcher = _Dispatcher()
