"""The table of rules: what is called in place of a torch function that meets a PatchTensor, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

Rule = Callable[..., Any]


def no_rule(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a function without a rule: it is gathered, as where a rule does not apply."""
    return NotImplemented


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """What is known of a torch function. ``rule`` gets the function and its arguments, and may return NotImplemented.

    ``any_order``: the rule treats all rows alike, in whichever order a rank holds them (``BlockLayout``); or what
    tells so of a call. ``order_free``: where a row stands makes no difference to it, if one argument alone is sharded;
    or what tells so of a call: rows in blocks are handed to the rule as if they stood in order.
    ``view``: the result is, or may be, a view of the first argument. ``moves_dims``: in place it changes no value,
    but which dim is which. ``keeps_statistics``: it writes to its arguments behind the first, of which neither its
    name nor its schema says anything.
    ``elementwise``: by the rule ``pointwise``, which applies to every call, with ``out=`` too, and returns the
    function's own answer: NotImplemented of an operator, for an operand of another kind.
    ``asks_if_empty``: of a tensor without elements torch itself says what becomes of it. ``of_many_kernels``: which one
    computes the result, and so how it stands in memory, depends on its size. ``keeps_format``: the result is
    channels-last where the input is, and else contiguous; or what tells so of a call. ``promotes_numbers``: to torch a
    number beside a tensor is a tensor of no dims. ``asks_when_plain``: of an ``autograd.Function`` in which
    ranks talk to each other, that the rule is asked too where no argument is sharded.
    """

    rule: Rule = no_rule
    any_order: bool | Callable[..., bool] = False
    order_free: bool | Callable[..., bool] = False
    view: bool = False
    moves_dims: bool = False
    keeps_statistics: bool = False
    elementwise: bool = False
    asks_if_empty: bool = False
    of_many_kernels: bool = False
    keeps_format: bool | Callable[..., bool] = False
    promotes_numbers: bool = False
    asks_when_plain: bool = False


class Dispatcher(Protocol):
    """Who calls the rules (rules/core/dispatch.py): for sharded tensors, for those in blocks, and for copies."""

    def on_rows(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any: ...
    def on_blocks(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def on_copies(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class RuleTable(dict[Any, RuleEntry]):
    """The entry of each torch function; one of which nothing is known has an empty entry.

    ``kinds``: of a type of functions, such as the operators of ``torch.ops`` (exported/operators.py), what tells of
    each which function made of others that have rules is called instead, if one is.
    """

    dispatcher: Dispatcher

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[type, Callable[[Any], Callable[..., Any] | None]] = {}

    def __missing__(self, func: Any) -> RuleEntry:
        stand_in = self.stand_in(func)
        return _UNKNOWN if stand_in is None else RuleEntry(lambda _func, *args, **kwargs: stand_in(*args, **kwargs))

    def has_rule(self, func: Any) -> bool:
        entry = self.get(func)
        return entry is not None and entry.rule is not no_rule

    def stand_in(self, func: Any) -> Callable[..., Any] | None:
        """What to call in place of a function that has no rule of its own, or None."""
        kind = self.kinds.get(type(func))
        return None if kind is None or func in self else kind(func)


_UNKNOWN = RuleEntry()
RULES = RuleTable()
