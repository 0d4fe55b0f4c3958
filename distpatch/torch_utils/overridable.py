"""Functions of distpatch's own that sharded tensors have rules for, as they have for torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

F = TypeVar("F", bound=Callable[..., Any])


def overridable(func: F) -> F:
    """A function of one rank's rows, its first argument: where these are sharded themselves, their rule is called."""

    @wraps(func)
    def call(rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        if type(rows) is Tensor or not has_torch_function_unary(rows):
            return func(rows, *args, **kwargs)
        return handle_torch_function(call, (rows,), rows, *args, **kwargs)

    return call  # type: ignore[return-value]
