"""``convert_model(compile=...)``: calls of a converted model's entry points, compiled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from distpatch.errors import DistPatchError
from distpatch.model.calls import Conversion
from distpatch.model.compile_ops import tells_of_exceptions

SHAPES = 64  # each has a graph of its own; torch's own limit is 8


def compiled_calls(entry: Callable[..., Any], state: Conversion) -> Callable[..., Any]:
    """The same entry point, compiled where the model was converted so and the call can be.

    Calls inside the sharded computation, inside somebody else's compiled function, and displaced steps run as they
    are. Raises ``DistPatchError`` where torch cannot.
    """
    told = state.options.compile
    if told is False:
        return entry
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        raise DistPatchError(f"convert_model: compile= needs torch 2.13 or later; this is {torch.__version__}")
    given = {} if told is True else dict(told)
    defaults = {"fullgraph": True, "dynamic": False, "recompile_limit": SHAPES, "isolate_recompiles": True}
    compiled = torch.compile(entry, **{**defaults, **given})

    @functools.wraps(entry)
    def call(*args: Any, **kwargs: Any) -> Any:
        if state.thread.inside or state.steps is not None or torch.compiler.is_compiling():
            return entry(*args, **kwargs)
        with tells_of_exceptions():
            return compiled(*args, **kwargs)

    return call
