"""Functions of distpatch's own that sharded tensors have rules for, as they have for torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import handle_torch_function

from distpatch.torch_utils.private import ASKS_NOBODY

F = TypeVar("F", bound=Callable[..., Any])


def has_rules(rows: Tensor) -> bool:
    """Whether these are sharded themselves; unlike ``has_torch_function`` not where a mode is on."""
    kind = type(rows)
    return kind is not Tensor and kind.__torch_function__ is not ASKS_NOBODY


def overridable(func: F) -> F:
    """A function of one rank's rows, its first argument: where these are sharded themselves, their rule is called."""

    @wraps(func)
    def call(rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not has_rules(rows):
            return func(rows, *args, **kwargs)
        return handle_torch_function(call, (rows,), rows, *args, **kwargs)

    return call  # type: ignore[return-value]
