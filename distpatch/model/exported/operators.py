"""Operators of ``torch.ops``, as exported programs call them: each is the public function of its name.

``torch.ops.aten.relu.default(x)`` is ``torch.relu(x)``, which has a rule. Those whose arguments differ are in
forms.py and norms.py; one that is no function of torch's is gathered by its own name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from distpatch.model.exported import norms
from distpatch.model.exported.forms import FORMS
from distpatch.tensor.rule_table import RULES
from distpatch.torch_utils.private import OpOverload, OpOverloadPacket, nn_builtins
from distpatch.torch_utils.tree import map_tensors

_FAMILIES = {"linalg": torch.linalg, "fft": torch.fft, "special": torch.special}
_IGNORED = frozenset({"layout", "pin_memory"})  # where they say what is so anyway


def operator(func: Any) -> Callable[..., Any] | None:
    """What stands for an operator, or for an overload of one: None where no function of its name has a rule."""
    return _stand_in(getattr(func, "_overloadpacket", func))


@cache
def _stand_in(packet: OpOverloadPacket) -> Callable[..., Any] | None:
    public = _public(packet)
    if public is None:
        return None

    def call(*args: Any, **kwargs: Any) -> Any:
        for name in ("self", "input"):  # a method's first argument has no name
            if not args and name in kwargs:
                args = (kwargs.pop(name),)
        if not _IGNORED.isdisjoint(kwargs):
            kwargs = {key: value for key, value in kwargs.items() if key not in _IGNORED or value}
        return public(*args, **kwargs)

    return call


def _public(packet: OpOverloadPacket) -> Callable[..., Any] | None:
    """The function that takes an operator's arguments and has a rule."""
    space, _, name = packet._qualified_op_name.partition("::")
    if space != "aten":
        return None
    if name in FORMS:
        return FORMS[name]
    family, _, rest = name.partition("_")
    places = [(torch, name), (torch.Tensor, name), (nn_builtins, name), (F, name)]
    if family in _FAMILIES:
        places.append((_FAMILIES[family], rest))
    found = [vars(place).get(at) or getattr(place, at, None) for place, at in places]
    known = next((function for function in found if callable(function) and RULES.has_rule(function)), None)
    viewed = getattr(torch.ops.aten, name.removesuffix("_copy"), None)
    if known is None and name.endswith("_copy") and viewed is not None:
        return lambda *args, **kwargs: map_tensors(torch.clone, viewed(*args, **kwargs))
    return known


assert norms  # fills FORMS too
RULES.kinds[OpOverload] = RULES.kinds[OpOverloadPacket] = operator
