"""A call of a torch function that meets a sharded tensor: which rule it gets, and what is seen to around it.

Before the rule: deferred rows that read what the call writes to are computed, arguments get the names that the rule
has, ``out=`` is put aside. After it: where the rule does not apply the arguments are gathered (fallback.py); results
stand in memory as on one device (memory_order.py).
"""

from __future__ import annotations

from typing import Any

from distpatch.errors import UnsupportedOpError
from distpatch.lazy import buffer_reuse
from distpatch.rules.core.aliasing import before_writing, mutates, protect, through
from distpatch.rules.core.argument_names import normal
from distpatch.rules.core.fallback import computed_on_all, fallback
from distpatch.rules.core.memory_order import as_on_one_device
from distpatch.rules.core.operands import in_order
from distpatch.rules.core.out_argument import into
from distpatch.tensor.patch_tensor import BlockTensor, PatchCopy, PatchTensor
from distpatch.tensor.rule_table import RULES, RuleEntry, no_rule
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors, tensors_in


class _Dispatcher:
    """What the tensors call (tensor/patch_tensor.py)."""

    def on_rows(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """A call on sharded tensors."""
        if buffer_reuse.anything_deferred():
            before_writing(func, args, kwargs or {})
        entry = RULES[func]
        if kwargs or entry.asks_if_empty:
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
            if result.row_layout.is_tiny or entry.of_many_kernels:
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
        if buffer_reuse.anything_deferred():
            before_writing(func, args, kwargs)
        if (stand_in := RULES.stand_in(func)) is not None:  # what it calls comes here by itself
            return stand_in(*args, **kwargs)
        entry = RULES[func]
        if _is_any_order(entry, func, args, kwargs):
            return _applied(entry, func, args, kwargs)
        written = [t for t in tensors_in(mutates(func, args, kwargs)) if isinstance(t, BlockTensor)]
        if written:
            raise UnsupportedOpError(
                f"{op_name(func)} would write to {written[0]!r}, whose rows are merged with a dim in front of "
                "them. Write to the tensor before the merge, or use the out-of-place form."
            )
        source = next(t for t in tensors_in((args, kwargs)) if isinstance(t, BlockTensor))
        args, kwargs = map_tensors(in_order, args), map_tensors(in_order, kwargs)
        return protect(func, source, func(*args, **kwargs), args)

    def on_copies(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on copies of rows that are views on one device."""
        if (stand_in := RULES.stand_in(func)) is not None:
            return stand_in(*args, **kwargs)
        return through(func, args, kwargs)


def _is_any_order(entry: RuleEntry, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the rule treats all rows of this call alike."""
    if not callable(entry.any_order):
        return entry.any_order
    places, named = normal(entry, func, args, kwargs) if kwargs else (args, kwargs)
    return entry.any_order(*places, **named)


def _applied(entry: RuleEntry, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the rule makes of a call; where it does not apply, or has nothing to say of no elements, what torch does."""
    places, named = normal(entry, func, args, kwargs) if kwargs else (args, kwargs)
    if "out" in named:
        if not (entry.elementwise or entry.rule is no_rule) and named["out"] is not None:
            return into(func, places, named)
        if named["out"] is None:
            named = {key: value for key, value in named.items() if key != "out"}
    if entry.asks_if_empty and places and isinstance(places[0], PatchTensor) and 0 in places[0].shape:
        return computed_on_all(func, places, named)
    result = entry.rule(func, *places, **named)
    return fallback(func, *args, **kwargs) if result is NotImplemented and not entry.elementwise else result


RULES.dispatcher = _Dispatcher()
