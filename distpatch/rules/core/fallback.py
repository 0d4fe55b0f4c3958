"""Functions without a rule: gathered, computed by every rank, sharded again, counted and named."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.layout.blocks import BlockLayout
from distpatch.rules.core.aliasing import mutates, protect, written_tensors
from distpatch.rules.core.gather_records import record, shapes_of
from distpatch.rules.core.registry import describe, named
from distpatch.rules.core.wrapping import reshard
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated, shard_in
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors, tensors_in


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
            f"{op_name(func)} would give a sharded tensor the shape {tuple(copy.shape)} ({shapes_of(sharded)}; rank "
            f"{x.rank}), and has no sharded rule. Use its out-of-place form, or register a rule "
            "(distpatch.register_rule)."
        )
    x.copy_(copy)


def _shard_again(tensor: Tensor, lead: PatchTensor) -> Tensor:
    """A slice where the result is as tall as the input was; it is right either way."""
    rows = lead.row_layout
    if tensor.ndim != lead.ndim or tensor.shape[rows.dim] != rows.size or isinstance(tensor, PatchTensor):
        return tensor
    if isinstance(rows, BlockLayout):
        return reshard(lead, tensor, rows.dim)
    return shard_in(lead.region, tensor, rows)


# Views without a rule, and norms that write to their statistics.
describe(*named("diagonal", "meshgrid"), torch.linalg.diagonal, view=True)
describe(
    *named("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"),
    *named("batch_norm_gather_stats", "batch_norm_gather_stats_with_counts", "batch_norm_update_stats"),
    *named("fused_moving_avg_obs_fake_quant"),
    keeps_statistics=True,
)
