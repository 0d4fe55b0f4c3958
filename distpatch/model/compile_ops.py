"""What torch.compile sees of entering and leaving a sharded computation: three operators.

Dynamo puts operators of a sharded tensor into its graph as they are; the rules run when AOTAutograd traces that
graph, as ordinary Python on fake rows. So Dynamo needs no more than operators for what is no torch function: to
meet the other ranks, to shard, to gather. What is left then are plain tensors and transfers, which are operators
too (comm/row_exchange.py, comm/collectives.py), with an effect, so that all ranks keep them, in the same order.
"""

from __future__ import annotations

import operator
import secrets
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.collectives import gather_rows
from distpatch.comm.communicator import communicator_of
from distpatch.layout.rows import RowLayout, even_bounds
from distpatch.tensor.patch_tensor import PatchTensor, check_dim, shard_in
from distpatch.tensor.region import Region
from distpatch.tensor.rule_table import RULES, RuleEntry
from distpatch.torch_utils.private import keep_in_order


@torch.library.custom_op("distpatch::meet", mutates_args=())
def meet(name: str, what: str, signature: str) -> None:
    """Meet the other ranks, which must all come with the same call, at every run of a compiled graph."""
    communicator_of(name).enter(what, signature)


@meet.register_fake
def _(name: str, what: str, signature: str) -> None:
    return None


keep_in_order(meet)


def enter(tensor: Tensor, dim: int, region: Region) -> PatchTensor:
    """An argument sharded evenly along ``dim``, or one that is sharded already, in this region."""
    if isinstance(tensor, PatchTensor):
        return PatchTensor(tensor.local, tensor.row_layout, region)
    dim = check_dim(tensor, dim)
    return shard_in(region, tensor, RowLayout(dim, even_bounds(tensor.shape[dim], region.comm.size)))


# AOTAutograd caches on disk what it made of a graph, and does not know of the rules that made it.
_THIS_PROCESS = secrets.token_hex(8)


def _enter(tensor: Tensor, dim: int, name: str, splits: str, *options: Any) -> Tensor:
    region = Region(communicator_of(name), int(splits) if splits.isdigit() else splits, *options[:-1])
    sizes = [operator.index(n) for n in tensor.shape]  # layouts are constants: no size is a symbol
    return enter(tensor if isinstance(tensor, PatchTensor) else tensor.view(sizes), dim, region)


def enter_compiled(tensor: Tensor, dim: int, region: Region) -> Tensor:
    splits, *options = region.options
    return torch.ops.distpatch.enter(tensor, dim, region.comm.name, str(splits), *options, _THIS_PROCESS)


def _gather(tensor: Tensor, op: str) -> Tensor:
    assert isinstance(tensor, PatchTensor)
    return gather_rows(tensor.local, tensor.row_layout, tensor.region.comm.name, op)


_library = torch.library.Library("distpatch", "FRAGMENT")
for _schema, _function in (
    (
        "enter(Tensor x, int dim, str name, str splits, bool sequential, str fallback, int min_numel, "
        "int? workspace_bytes, str process) -> Tensor",
        _enter,
    ),
    ("gather(Tensor x, str op) -> Tensor", _gather),
):
    _name = _library.define(_schema)
    _library.impl(_name, _function, "CompositeImplicitAutograd")


def _on_sharded(function: Any) -> Any:
    return lambda func, *args: function(*args)


for _op, _function in ((torch.ops.distpatch.enter, _enter), (torch.ops.distpatch.gather, _gather)):
    RULES[_op] = RULES[_op.default] = RuleEntry(_on_sharded(_function))
