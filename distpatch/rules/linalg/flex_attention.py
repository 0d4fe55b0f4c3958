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

from distpatch.layout.rows import BlockLayout
from distpatch.lazy.row_patches import with_dummy_row
from distpatch.rules.core.operands import whole_operand, wrap
from distpatch.rules.core.registry import rule
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils import patches


@functools.wraps(module.flex_attention)
def flex_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    operands = (query, key, value)
    if has_torch_function(operands):
        return handle_torch_function(flex_attention, operands, *operands, *args, **kwargs)
    return _PATCH.original(*operands, *args, **kwargs)


_PATCH = patches.register(module, "flex_attention", flex_attention, by_name=True)


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
        mod = block_mask.mask_mod

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return mod(b, h, number[q], k)

        batch, heads = block_mask.kv_num_blocks.shape[:2]
        sizes = (batch, heads, len(number), keys.shape[2])
        mask = module.create_block_mask(visible, *sizes, query.device, block_mask.BLOCK_SIZE)
    out = func(own, keys, values, score, mask, scale, enable_gqa, **more)
    return wrap(out.narrow(2, 0, 0) if idle else out, query)


def _numbers(x: PatchTensor) -> Tensor:
    """Which rows of the whole tensor this rank's are, in the order in which it holds them."""
    layout = x.row_layout
    if isinstance(layout, BlockLayout):
        lo, hi = layout.opened.interval(x.rank)
        blocks = torch.arange(layout.blocks, device=x.device)[:, None] * layout.opened.size
        return (blocks + torch.arange(lo, hi, device=x.device)).flatten()
    return torch.arange(*layout.interval(x.rank), device=x.device)
