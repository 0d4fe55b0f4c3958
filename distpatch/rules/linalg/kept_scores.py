"""Whether attention keeps its scores, (queries, keys) for each head: torch's kernels but one never do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from distpatch.torch_utils.chunk_sizes import kind_of, planned_for
from distpatch.torch_utils.overridable import has_rules
from distpatch.torch_utils.private import FakeTensor, fused_attention

HALF = {torch.float16, torch.bfloat16}
aten = torch.ops.aten


def keeps_scores(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool = False, enable_gqa: bool = False
) -> bool:
    """Whether the kernel that will run for these keeps all their scores at once.

    torch is asked, which runs nothing; where it cannot tell, of tensors without data and for a device that is
    planned for, these are its rules. On a CPU they are always used, so that a plan and its run do the same.
    """
    kind = kind_of(query.device)
    if kind == "cpu":
        return not _fuses_on_cpu(query, key, value, mask, enable_gqa)
    if planned_for.kind or type(query) is FakeTensor or torch.compiler.is_compiling():
        return not _fuses_on_cuda(query, key, value, mask, enable_gqa)
    try:
        chosen = fused_attention(query, key, value, mask, 0.0, is_causal, enable_gqa=enable_gqa)
    except (NotImplementedError, RuntimeError):  # a device of which torch keeps no such list
        return True
    return bool(chosen == SDPBackend.MATH.value)


def planned(func: Any) -> Any:
    """``scaled_dot_product_attention`` as the device runs it that is planned for; ``func`` where none is."""
    return func if planned_for.kind in {None, "cpu"} else _planned


def _planned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    result: Tensor
    if any(map(has_rules, (query, key, value))):  # sharded over an inner axis, whose rule comes here again
        return F.scaled_dot_product_attention(
            query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if keeps_scores(query, key, value, mask, is_causal, enable_gqa):
        options = {"scale": scale, "enable_gqa": enable_gqa}
        result, _ = aten._scaled_dot_product_attention_math(query, key, value, mask, 0.0, is_causal, **options)
    else:
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        result, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, recorded, 0.0, is_causal, scale=scale
        )
    return result


def with_sums(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Attention, and the logarithms of the sums of its weights, (..., N, 1), by a kernel that keeps no scores.

    None where torch has none for these. It has no gradients.
    """
    if kind_of(query.device) == "cpu":
        if not _fuses_on_cpu(query, key, value, None, False):
            return None
        result, sums = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, scale=scale)
    elif kind_of(query.device) == "cuda" and _is_dense(query, key, value, False) and _is_efficient(query, key, value):
        result, sums, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, False, scale=scale
        )
        sums = sums[..., : query.shape[-2]]  # the kernel's are as many as fill its blocks
    else:
        return None
    return result, sums.unsqueeze(-1)


def _fuses_on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> bool:
    """What aten/src/ATen/native/transformers/sdp_utils_cpp.cpp asks of its flash attention, on the safe side."""
    return (
        torch.backends.cuda.flash_sdp_enabled()  # of CPUs too
        and _is_dense(query, key, value, enable_gqa)
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and (mask is None or not mask.requires_grad)
    )


def _fuses_on_cuda(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> bool:
    """What aten/src/ATen/native/transformers/cuda/sdp_utils.cpp asks, on cards since Ampere, on the safe side.

    Flash attention takes half precision, heads of up to 256 and no mask; the memory-efficient kernel any head, whose
    bytes are a multiple of 16. cuDNN's takes less than both together.
    """
    if not _is_dense(query, key, value, enable_gqa):
        return False
    sizes, half = {query.shape[-1], key.shape[-1], value.shape[-1]}, query.dtype in HALF
    if torch.backends.cuda.flash_sdp_enabled() and half and mask is None and len(sizes) == 1 and max(sizes) <= 256:
        return True
    return _is_efficient(query, key, value)


def _is_efficient(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the memory-efficient kernel takes them, on the safe side."""
    sizes = {query.shape[-1], key.shape[-1], value.shape[-1]}
    return (
        torch.backends.cuda.mem_efficient_sdp_enabled()
        and query.dtype in {*HALF, torch.float32}
        and query.shape[-3] == key.shape[-3]
        and all(size * query.element_size() % 16 == 0 for size in sizes)
    )


def _is_dense(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Four dims (batch, heads, tokens, numbers), of which the last is dense; none is repeated but with GQA."""
    tensors = (query, key, value)
    return (
        all(t.ndim == 4 and t.stride(-1) == 1 and t.dtype == query.dtype for t in tensors)
        and all(t.shape[0] == query.shape[0] and t.shape[-2] > 0 for t in tensors)
        and key.shape[1] == value.shape[1]
        and (enable_gqa or query.shape[1] == key.shape[1])
    )
