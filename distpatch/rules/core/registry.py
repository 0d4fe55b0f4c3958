"""How rules are written down, and what they share.

A rule is called in place of a torch function that meets a PatchTensor: ``rule(func, *args, **kwargs)``
with the arguments of the call. It reads like this: find the output layout, fetch the rows, call plain
torch on ``.local``, wrap. Where it does not apply it returns ``NotImplemented``, and the arguments are gathered.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.tensor.rule_table import RULES, Rule, RuleEntry
from distpatch.torch_utils.private import OpOverload, OpOverloadPacket

R = TypeVar("R", bound=Rule)


def rule(*funcs: Any, **properties: Any) -> Callable[[R], R]:
    """Register the decorated rule for these torch functions, with what else is known of them (``RuleEntry``)."""

    def register(handler: R) -> R:
        for func in funcs:
            assert func not in RULES, f"two entries for {func}"
            RULES[func] = RuleEntry(handler, **properties)
        return handler

    return register


def describe(*funcs: Any, **properties: Any) -> None:
    """What is known of torch functions that have no rule."""
    for func in funcs:
        assert func not in RULES, f"two entries for {func}"
        RULES[func] = RuleEntry(**properties)


def first_dim(input: Tensor, *_: Any, **__: Any) -> bool:
    """Whether the first dim is sharded, along which there are neither windows nor a resize."""
    return isinstance(input, PatchTensor) and input.row_layout.dim == 0


def beside_rows(input: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether the one dim that a function works along is given, and is not the sharded one."""
    dim = kwargs.get("dim", next((a for a in args if type(a) is int), None))
    return dim is not None and isinstance(input, PatchTensor) and nth(dim, input.ndim) != input.row_layout.dim


def register_rule(func: Any) -> Callable[[R], R]:
    """Give a function of your own (or of torch) a sharded rule: ``@distpatch.register_rule(func)``.

    The rule takes the function's own arguments and is called where one of them is a PatchTensor. It may return
    ``NotImplemented``: then the arguments are gathered, as without a rule. The function must be overridable by
    ``__torch_function__``: any torch function, an operator of ``torch.library`` (all its overloads), an
    ``autograd.Function``, or your own through ``torch.overrides.handle_torch_function``. For element-wise ones see
    ``register_pointwise``.
    """

    def register(handler: R) -> R:
        for key in keys(func):
            known = RULES.get(key, RuleEntry())
            RULES[key] = RuleEntry(
                lambda _func, *args, **kwargs: handler(*args, **kwargs), view=known.view, moves_dims=known.moves_dims
            )
        return handler

    return register


def keys(func: Any) -> list[Any]:
    """What torch may ask a rule for when the function is called: of an operator, itself and its overloads."""
    func = getattr(func, "_opoverload", func)  # of a torch.library.custom_op
    if isinstance(func, OpOverload) and func._overloadpacket.overloads() == [func._overloadname]:
        func = func._overloadpacket
    if isinstance(func, OpOverloadPacket):
        return [func, *(getattr(func, name) for name in func.overloads())]
    return [func]


def named(*names: str) -> list[Any]:
    """Every public torch function of these names: torch, Tensor methods, nn.functional, special.

    A name that a torch release does not have is skipped. Those of ``torch.linalg`` are asked for by
    ``of_linalg``: some do something else than their namesakes (``polar``).
    """
    return _found((torch, torch.Tensor, F, torch.special), names)


def of_linalg(*names: str) -> list[Any]:
    """The functions of these names in torch.linalg; one that a torch release does not have is skipped."""
    return _found((torch.linalg,), names)


def _found(places: tuple[Any, ...], names: tuple[str, ...]) -> list[Any]:
    found = [vars(place).get(name) or getattr(place, name, None) for place in places for name in names]
    unique = {id(func): func for func in found if callable(func)}
    return [func for func in unique.values() if not isinstance(func, type)]


def written(x: PatchTensor) -> PatchTensor:
    """A tensor whose rows were written to. Where there are none and they are a view, they are taken from it anew:

    the derivative of what autograd puts in a written view's place is cut off in torch where the view is empty.
    """
    base = x.local._base
    if base is not None and x.local.numel() == 0 and type(x.local.grad_fn).__name__.startswith("AsStrided"):
        x.local = base[None].narrow(0, 0, 0).view(x.local.shape)
    return x


def nth(dim: int, ndim: int) -> int:
    """A dim counted from the front; ``IndexError`` where there is no such dim."""
    dim, most = operator.index(dim), max(ndim, 1)
    if not -most <= dim < most:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-most}, {most - 1}], but got {dim})")
    return dim % most
