"""A batch merged in front of the rows: each rank has some rows of every block, and they stay where they are.

``x.view(batch * windows, ...)`` of rows sharded by windows would scatter every rank's rows over the merged
dim. They are left in place (``BlockLayout``) as long as only functions that treat all rows alike meet them,
until a later view takes the dims apart again. Any other function gets the rows in order, which is one
exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.exchange import fetch_rows
from distpatch.layout import OutOfOrder, RowLayout, even_bounds, needs_in_order
from distpatch.rules.fallback import record
from distpatch.rules.pointwise import pointwise
from distpatch.rules.registry import named, op_name, reshard
from distpatch.rules.views import mutates, protect
from distpatch.tensor import RULES, BlockTensor, PatchCopy, PatchTensor, whole
from distpatch.tree import map_tensors, tensors_in

MOST_PIECES = 1024  # more intervals of rows a rank than this are not worth an exchange of their own

# Functions whose rules, where they do not ask for bounds, treat all rows alike. Element-wise ones too.
ANY_ORDER = set(
    named(
        *"permute transpose swapaxes swapdims movedim moveaxis unsqueeze squeeze flatten unflatten reshape".split(),
        *"view _unsafe_view view_as reshape_as ravel expand expand_as broadcast_to repeat tile cat concat".split(),
        *"concatenate stack chunk split tensor_split split_with_sizes unsafe_chunk unsafe_split unbind".split(),
        *"narrow select __getitem__ t adjoint softmax log_softmax softmin sum mean any all amax amin".split(),
        *"count_nonzero zeros_like ones_like empty_like full_like dropout to type_as cpu cuda type size dim".split(),
        *"numel nelement is_floating_point is_complex is_contiguous stride linear layer_norm rms_norm".split(),
        *"matmul bmm __matmul__ embedding requires_grad_ retain_grad register_hook backward new_zeros".split(),
        *"new_ones new_empty new_full new_tensor scaled_dot_product_attention __hash__ __len__ __repr__".split(),
        *"element_size get_device ndimension is_signed result_type glu normalize".split(),
        *"group_norm batch_norm instance_norm".split(),
    )
).union([torch.linalg.matmul])


def on_blocks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The rule on the rows as they are, or, where it needs or may need to know their order, in order."""
    if kwargs:
        args, kwargs = RULES.normal(func, args, kwargs)
    if (stand_in := RULES.stand_in(func)) is not None:  # what it calls comes here by itself
        return stand_in(*args, **kwargs)
    rule = RULES[func]
    if func in ANY_ORDER or rule is pointwise or getattr(func, "__name__", "") in {"__get__", "__set__"}:
        try:
            return rule(func, *args, **kwargs)
        except OutOfOrder:
            pass
    written = [t for t in tensors_in(mutates(func, args, kwargs)) if isinstance(t, BlockTensor)]
    if written:
        raise UnsupportedOpError(
            f"{op_name(func)} would write to {written[0]!r}, whose rows are merged with a dim in front of "
            "them. Write to the tensor before the merge, or use the out-of-place form."
        )
    source = next(t for t in tensors_in((args, kwargs)) if isinstance(t, BlockTensor))
    args, kwargs = map_tensors(in_order, args), map_tensors(in_order, kwargs)
    return protect(func, source, func(*args, **kwargs), args)


def in_order(tensor: Tensor) -> Tensor:
    """A ``BlockTensor`` with its rows in order, shared evenly; any other tensor as it is."""
    if isinstance(tensor, PatchCopy):
        tensor = tensor.plain
    if not isinstance(tensor, BlockTensor):
        return tensor
    layout, comm = tensor.rows, tensor.region.comm
    bounds = even_bounds(layout.size, comm.size)
    needs = needs_in_order(layout.inner, layout.blocks, bounds)
    if len(needs[0]) > MOST_PIECES:
        record("reshape", [tensor])
        return reshard(tensor, whole(tensor), layout.dim)
    held = tuple(b * layout.blocks for b in layout.inner)
    pieces = fetch_rows(tensor.local, layout.dim, held, needs, comm.name, "reshape", False)
    return PatchTensor(torch.cat(pieces, layout.dim), RowLayout(layout.dim, bounds), tensor.region)


def merged_place(old: Sequence[int], new: Sequence[int], dim: int) -> tuple[int, int] | None:
    """Where ``old[dim]`` ends up in ``new`` behind dims merged in front of it: (new dim, blocks)."""
    in_front = size = 1
    for n in old[:dim]:
        in_front *= n
    for at, n in enumerate(new):
        blocks, rest = divmod(in_front, size)
        if rest or blocks < 1:
            return None
        if n > 1 and n % blocks == 0 and blocks > 1:
            return at, blocks
        size *= n
    return None


RULES.on_blocks = on_blocks
