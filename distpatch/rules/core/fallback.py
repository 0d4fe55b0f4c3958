"""Functions without a rule: gathered, computed by every rank, sharded again, counted and named."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.layout.rows import BlockLayout
from distpatch.rules.core.aliasing import mutates, protect, written_tensors
from distpatch.rules.core.operands import reshard
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated, shard_in
from distpatch.tensor.rule_table import RULES
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors, tensors_in

_HOME = Path(__file__).parents[2]


def fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Gather every PatchTensor argument, call the function, shard outputs as tall as the input.

    What the call wrote to a gathered copy is written to the rows that it was gathered from, in place: views of
    them see it. Raises ``UnsupportedOpError`` where the region says ``fallback="error"``, and where a sharded
    argument would get another shape.
    """
    sharded = [t for t in tensors_in((args, kwargs)) if isinstance(t, PatchTensor)]
    record(op_name(func), sharded)
    return computed_on_all(func, args, kwargs)


def computed_on_all(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function on all rows of its sharded arguments, on every rank; its results are sharded as they were."""
    sharded = [t for t in tensors_in((args, kwargs)) if isinstance(t, PatchTensor)]
    lead = sharded[0]
    kept = {id(t): t for t in tensors_in(mutates(func, args, kwargs))}  # plain tensors that are written to
    copies: dict[int, tuple[PatchTensor, Tensor]] = {}
    written = {id(t) for t in written_tensors(func, args, kwargs)}
    full_args, full_kwargs = map_tensors(partial(_gathered, copies, written), (args, kwargs))
    before = [(copy._version, copy.grad_fn) for _, copy in copies.values()]
    result = func(*full_args, **full_kwargs)
    for (x, copy), (version, grad_fn) in zip(copies.values(), before):
        if copy._version != version:
            with torch.set_grad_enabled(copy.grad_fn is not grad_fn):  # else it was written outside the graph
                _write_back(func, x, copy, sharded)
            kept[id(copy)] = x
        elif id(x) in written:  # names, an attribute
            raise UnsupportedOpError(
                f"{op_name(func)} would change something of {x!r} that is not its values, on a gathered copy. Register "
                "a rule (distpatch.register_rule)."
            )
    result = map_tensors(lambda t: kept[id(t)] if id(t) in kept else _shard_again(t, lead), result)
    return protect(func, lead, result, args)


def _gathered(copies: dict[int, tuple[PatchTensor, Tensor]], written: set[int], tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, noted in ``copies``; in inference mode too they count their versions.

    Of one that will be written to a copy that shares no memory with its rows.
    """
    if not isinstance(tensor, PatchTensor):
        return tensor
    if id(tensor) not in copies:
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
            full = gather_replicated(tensor)
            alone = full.is_inference() or id(tensor) in written
            copies[id(tensor)] = tensor, full.clone() if alone else full
    return copies[id(tensor)][1]


def _write_back(func: Any, x: PatchTensor, copy: Tensor, sharded: Sequence[PatchTensor]) -> None:
    if copy.shape != x.shape:
        raise UnsupportedOpError(
            f"{op_name(func)} would give a sharded tensor the shape {tuple(copy.shape)} ({_shapes(sharded)}; rank "
            f"{x.region.comm.rank}), and has no sharded rule. Use its out-of-place form, or register a rule "
            "(distpatch.register_rule)."
        )
    x.copy_(copy)


def record(name: str, sharded: Sequence[PatchTensor]) -> None:
    """Count that these tensors are gathered, and say so or refuse, as the region wants it."""
    lead, region = sharded[0], sharded[0].region
    shapes = _shapes(sharded)
    if region.options.fallback == "error":
        raise UnsupportedOpError(
            f"{name} has no sharded rule ({shapes}; rank {region.comm.rank}) and fallback='error' "
            "forbids to gather its arguments. Use fallback='warn' or 'allow', or register a rule "
            "(distpatch.register_rule)."
        )
    size_bytes = sum(t.numel() * t.element_size() for t in sharded)
    lead.region.comm.recorder.fallback(name, shapes, _call_site(), size_bytes)
    if region.options.fallback == "warn" and name not in region.warned:
        region.warned.add(name)
        warnings.warn(
            f"distpatch has no sharded rule for {name}: its arguments ({shapes}) are gathered on every "
            "rank. The result is right, but costs the memory of one device. See distpatch.trace().",
            stacklevel=4,
        )


def _shapes(sharded: Sequence[PatchTensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} sharded along dim {t.row_layout.dim}" for t in sharded)


def _shard_again(tensor: Tensor, lead: PatchTensor) -> Tensor:
    """A slice where the result is as tall as the input was; it is right either way."""
    rows = lead.row_layout
    if tensor.ndim != lead.ndim or tensor.shape[rows.dim] != rows.size or isinstance(tensor, PatchTensor):
        return tensor
    if isinstance(rows, BlockLayout):
        return reshard(lead, tensor, rows.dim)
    return shard_in(lead.region, tensor, rows)


def _call_site() -> str:
    """The innermost line outside distpatch and torch."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if _HOME not in path.parents and "torch" not in path.parts:
            return f"{path.name}:{frame.lineno}"
    return "?"


RULES.fallback = fallback
