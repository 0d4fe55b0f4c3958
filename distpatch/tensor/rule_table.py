"""The table of rules: what is called in place of a torch function that meets a PatchTensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = Callable[..., Any]


class RuleTable(dict[Any, Rule]):
    """Rules by torch function. A function without a rule gets ``fallback`` (rules/core/fallback.py).

    ``kinds``: of a type of functions, such as the operators of ``torch.ops`` (exported/operators.py), what tells of
    each which function made of others that have rules stands for it, if one does.
    ``before_writing`` sees to it that what waits for rows is computed before they change, ``through`` to a call
    on a copy of rows (aliasing.py), ``on_blocks`` to one on a ``BlockTensor`` (block_layout.py), ``into`` to
    one with ``out=`` (in_place.py); ``normal`` gives arguments the names that a rule has (argument_names.py).
    ``as_on_one_device`` sees to it that results stand in memory as on one device (memory_order.py), where rows do not
    tell, and for functions ``of_many_kernels``: which computes a result depends on its size.
    """

    as_on_one_device: Rule
    fallback: Rule
    before_writing: Rule
    on_blocks: Rule
    through: Rule
    into: Rule
    normal: Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
    kinds: dict[type, Callable[[Any], Callable[..., Any] | None]]

    def __init__(self) -> None:
        super().__init__()
        self.of_many_kernels: set[Any] = set()

    def __missing__(self, func: Any) -> Rule:
        stand_in = self.stand_in(func)
        return self.fallback if stand_in is None else lambda _func, *args, **kwargs: stand_in(*args, **kwargs)

    def stand_in(self, func: Any) -> Callable[..., Any] | None:
        """What to call in place of a function that has no rule of its own, or None."""
        kind = self.kinds.get(type(func))
        return None if kind is None or func in self else kind(func)


RULES = RuleTable()
