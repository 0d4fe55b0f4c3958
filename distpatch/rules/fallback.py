"""Functions without a rule: gathered, computed by every rank, sharded again, counted and named."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.layout import RowLayout
from distpatch.rules.pointwise import mutates
from distpatch.rules.registry import op_name
from distpatch.tensor import RULES, PatchTensor, shard_in, whole
from distpatch.tree import map_tensors, tensors_in

_HOME = Path(__file__).parents[1]


def fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Gather every PatchTensor argument, call the function, shard outputs as tall as the input.

    Raises ``UnsupportedOpError`` where the region says ``fallback="error"``, and for functions that
    write to a sharded argument: the gathered copy would take the change.
    """
    sharded = [t for t in tensors_in((args, kwargs)) if isinstance(t, PatchTensor)]
    lead = sharded[0]
    region, name = lead.region, op_name(func)
    shapes = ", ".join(f"{tuple(t.shape)} sharded along dim {t.rows.dim}" for t in sharded)
    if any(isinstance(t, PatchTensor) for t in tensors_in(mutates(func, args, kwargs))):
        raise UnsupportedOpError(
            f"{name} would write to a sharded tensor ({shapes}; rank {region.comm.rank}) and has no "
            "sharded rule. Use its out-of-place form, or register a rule (distpatch.register_rule)."
        )
    if region.fallback == "error":
        raise UnsupportedOpError(
            f"{name} has no sharded rule ({shapes}; rank {region.comm.rank}) and fallback='error' "
            "forbids to gather its arguments. Use fallback='warn' or 'allow', or register a rule "
            "(distpatch.register_rule)."
        )
    size_bytes = sum(t.numel() * t.element_size() for t in sharded)
    region.comm.recorder.fallback(name, shapes, _call_site(), size_bytes)
    if region.fallback == "warn" and name not in region.warned:
        region.warned.add(name)
        warnings.warn(
            f"distpatch has no sharded rule for {name}: its arguments ({shapes}) are gathered on every "
            "rank. The result is right, but costs the memory of one device. See distpatch.trace().",
            stacklevel=3,
        )
    result = func(*map_tensors(whole, args), **map_tensors(whole, kwargs))
    return map_tensors(lambda t: _shard_again(t, lead), result)


def _shard_again(tensor: Tensor, lead: PatchTensor) -> Tensor:
    """A slice where the result is as tall as the input was; it is right either way."""
    dim = lead.rows.dim
    if tensor.ndim != lead.ndim or tensor.shape[dim] != lead.rows.size or isinstance(tensor, PatchTensor):
        return tensor
    return shard_in(lead.region, tensor, RowLayout(dim, lead.rows.bounds))


def _call_site() -> str:
    """The innermost line outside distpatch and torch."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if _HOME not in path.parents and "torch" not in path.parts:
            return f"{path.name}:{frame.lineno}"
    return "?"


RULES.fallback = fallback
