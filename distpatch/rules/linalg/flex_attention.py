"""``flex_attention``: queries stay, keys and values are fetched; masks are asked with the queries' global numbers.

Of torch's functions it alone does not dispatch ``__torch_function__``. A wrapper, which does, takes its place in its
module and where it was imported by name (torch_utils/patches.py); plain tensors take the way that they took before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as module
from torch.overrides import handle_torch_function, has_torch_function

from distpatch.comm.collectives import narrow_rows
from distpatch.layout.blocks import BlockLayout
from distpatch.lazy.row_patches import with_dummy_row
from distpatch.rules.core.operands import whole_operand
from distpatch.rules.core.registry import rule
from distpatch.rules.core.wrapping import wrap
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.torch_utils import patches
from distpatch.torch_utils.tree import map_tensors


@functools.wraps(module.flex_attention)
def flex_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    operands = (query, key, value)
    if has_torch_function(operands):
        return handle_torch_function(flex_attention, operands, *operands, *args, **kwargs)
    return _PATCH.original(*operands, *args, **kwargs)


def _from_kv_blocks(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """A mask of blocks of tokens that were found from sharded ones is replicated: it is asked for the keys of all."""
    return _BLOCKS.original.__get__(None, cls)(
        *map_tensors(gather_replicated, args), **map_tensors(gather_replicated, kwargs)
    )


_PATCH = patches.register(module, "flex_attention", flex_attention, by_name=True)
_BLOCKS = patches.register(module.BlockMask, "from_kv_blocks", classmethod(_from_kv_blocks))


@rule(flex_attention, any_order=True)
def attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: module.BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> Any:
    more = {"return_lse": return_lse, "kernel_options": kernel_options, "return_aux": return_aux}
    if not isinstance(query, PatchTensor) or query.row_layout.dim != 2 or return_lse or return_aux is not None:
        return NotImplemented
    number = _numbers(query)
    idle = number.numel() == 0  # it computes a blank query, and keeps none
    number = number.new_zeros(1) if idle else number
    own = with_dummy_row(query.local, 2)
    keys, values = (whole_operand(t, query, func) for t in (key, value))
    score, mask = score_mod, None
    if score_mod is not None:

        def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score_mod(s, b, h, number[q], k)

    if block_mask is not None:
        seen = _seen_by(block_mask)

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return seen(b, h, number[q], k)

        batch, heads = block_mask.kv_num_blocks.shape[:2]
        sizes = (batch, heads, len(number), keys.shape[2])
        mask = module.create_block_mask(visible, *sizes, query.device, block_mask.BLOCK_SIZE)
    out = func(own, keys, values, score, mask, scale, enable_gqa, **more)
    return wrap(out.narrow(2, 0, 0) if idle else out, query)


def _seen_by(mask: module.BlockMask) -> Callable[..., Tensor]:
    """What a mask lets a query see. Its blocks count where kernels are compiled alone: else torch asks ``mask_mod``."""
    mod, full_blocks, full_indices = mask.mask_mod, mask.full_kv_num_blocks, mask.full_kv_indices
    if not torch.compiler.is_compiling():
        return mod

    def listed(numbers: Tensor, indices: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h = (0 * b if numbers.shape[0] == 1 else b), (0 * h if numbers.shape[1] == 1 else h)
        row = q // mask.BLOCK_SIZE[0]
        places = torch.arange(indices.shape[-1], device=indices.device)
        return ((indices[b, h, row] == k // mask.BLOCK_SIZE[1]) & (places < numbers[b, h, row])).any(-1)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        some = listed(mask.kv_num_blocks, mask.kv_indices, b, h, q, k) & mod(b, h, q, k)
        if full_blocks is None or full_indices is None:
            return some
        return some | listed(full_blocks, full_indices, b, h, q, k)

    return seen


def _numbers(x: PatchTensor) -> Tensor:
    """Which rows of the whole tensor this rank's are, in the order in which it holds them."""
    layout = x.row_layout
    if isinstance(layout, BlockLayout):
        return narrow_rows(torch.arange(layout.size, device=x.device), layout.with_dim(0), x.rank)
    return torch.arange(*layout.interval(x.rank), device=x.device)
