"""What becomes of every torch function that meets a sharded tensor, read off the table of rules.

``python docs/coverage.py > docs/coverage.md`` writes the table (``make coverage``); a test compares it with the file.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from types import CodeType, FunctionType, MappingProxyType
from typing import Any

import torch
from torch.overrides import get_overridable_functions, resolve_name

from distpatch.rules.core.fallback import fallback
from distpatch.rules.tensor_api.metadata import no_such_attribute, refused
from distpatch.tensor.rule_table import RULES
from distpatch.torch_utils.op_names import op_name

KINDS = MappingProxyType(
    {
        "sharded": "a rule: every rank computes its own rows",
        "partial": "a rule that for some arguments gathers, as the fallback does",
        "fallback": "no rule: gathered, computed by every rank, sharded again, counted and reported",
        "refused": "an error that names the function and says what to do",
    }
)


def functions() -> dict[Any, str]:
    """Every function that torch lets a tensor type override, with its public name."""
    found = {func: resolve_name(func) or str(func) for funcs in get_overridable_functions().values() for func in funcs}
    for func in RULES:  # and the properties that can be set; setting any other is refused
        if getattr(func, "__name__", "") == "__set__":
            found[func] = f"torch.Tensor.{op_name(func)}"
    return found


def kind(func: Any) -> str:
    """One of ``KINDS``; of a function that nobody registered too."""
    if not RULES.has_rule(func):
        return "refused" if getattr(func, "__name__", "") == "__set__" else "fallback"
    rule = _rule(func)
    if rule in {refused, no_such_attribute}:
        return "refused"
    return "partial" if _gathers(rule) else "sharded"


def _rule(func: Any) -> Any:
    rule = RULES[func].rule
    return rule.func if isinstance(rule, functools.partial) else rule


def _gathers(rule: Any) -> bool:
    """Whether a rule, or a function of this package that it calls, may say that it does not apply."""
    reached, waiting = {rule}, [rule]
    while waiting:
        codes = _codes(waiting[-1])
        if any("NotImplemented" in code.co_names for code in codes):
            return True
        for called in _called(waiting.pop(), codes):
            if called is fallback:
                return True
            if called not in reached and called.__module__.startswith("distpatch.rules"):
                reached.add(called)
                waiting.append(called)
    return False


def _codes(function: FunctionType) -> list[CodeType]:
    """Its code, and that of the functions in it."""
    codes = [function.__code__]
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    return codes


def _called(function: FunctionType, codes: list[CodeType]) -> Iterator[FunctionType]:
    """The Python functions that a function's code names: globals, and what its closure holds."""
    held = [function.__globals__.get(name) for code in codes for name in code.co_names]
    held += [cell.cell_contents for cell in function.__closure__ or ()]
    yield from (value for value in held if isinstance(value, FunctionType))


def table() -> str:
    """The table in Markdown: a line a name and kind, the places where torch has it, the file of its rule."""
    rows: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for func, path in functions().items():
        place, name = _split(path)
        what = kind(func)
        file = _rule(func).__module__.rpartition(".")[2] if RULES.has_rule(func) else ""
        rows[name, what, file].add(place)
        counts[what] += 1
    release = ".".join(torch.__version__.split(".")[:2])
    lines = [
        "# Coverage",
        "",
        "Made by `python docs/coverage.py > docs/coverage.md` (`make coverage`) from the table of rules, for",
        f"torch {release}: {sum(counts.values())} functions, of which "
        + ", ".join(f"{counts[k]} {k}" for k in KINDS)
        + ".",
        "",
        *(f"- **{name}**: {meaning}" for name, meaning in KINDS.items()),
        "",
        "| function | of | is | in `rules/` |",
        "|---|---|---|---|",
    ]
    for (name, what, file), places in sorted(rows.items(), key=lambda row: (row[0][0].strip("_").lower(), row[0])):
        lines.append(f"| `{name}` | {', '.join(sorted(places))} | {what} | {file} |")
    return "\n".join(lines) + "\n"


def _split(path: str) -> tuple[str, str]:
    """``torch.Tensor.grad.__get__`` is ``grad`` (read) of Tensor, ``torch.fft.fft`` is ``fft`` of fft."""
    for ending, access in ((".__get__", " (read)"), (".__set__", " (write)")):
        if path.endswith(ending):
            place, name = _split(path.removesuffix(ending))
            return place, name + access
    place, _, name = path.rpartition(".")
    return place.removeprefix("torch.").removeprefix("functional") or "torch", name


if __name__ == "__main__":
    print(table(), end="")
