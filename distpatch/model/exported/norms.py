"""Norms, dropout, softmax and attention among the operators of ``torch.ops.aten``: as forms.py has it.

They also return statistics for a backward pass of their own: those of attention, which are gathered, are computed when
somebody asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.model.exported.forms import FORMS, Form, Results, aten, form
from distpatch.rules.core.fallback import fallback


@form("native_layer_norm")
def native_layer_norm(input: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
    dims = tuple(range(input.ndim - len(shape), input.ndim))
    return F.layer_norm(input, shape, weight, bias, eps), *_statistics(input.detach(), dims, eps, True)


@form("native_group_norm")
def native_group_norm(
    input: Tensor, weight: Any, bias: Any, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Tensor, ...]:
    statistics = _statistics(input.reshape(N, group, -1), (2,), eps, False)
    return F.group_norm(input, group, weight, bias, eps), *statistics


def _statistics(x: Tensor, dims: tuple[int, ...], eps: float, keepdim: bool) -> list[Tensor]:
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=keepdim)
    return [mean, (var + eps).rsqrt()]


@form("_fused_rms_norm")
def fused_rms_norm(input: Tensor, shape: Sequence[int], weight: Any, eps: float | None) -> tuple[Tensor, ...]:
    floor = torch.finfo(input.dtype).eps if eps is None else eps
    dims = tuple(range(input.ndim - len(shape), input.ndim))
    return F.rms_norm(input, shape, weight, eps), (input.square().mean(dims, True) + floor).rsqrt()


@form("batch_norm")
def batch_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float, *_: Any
) -> Any:
    return F.batch_norm(input, mean, var, weight, bias, training, momentum, eps)


@form("instance_norm")
def instance_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, own: bool, momentum: float, eps: float, *_: Any
) -> Any:
    return F.instance_norm(input, mean, var, weight, bias, own, momentum, eps)


@form("native_batch_norm")
def native_batch_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    if training:
        statistics = _statistics(input.detach(), (0, *range(2, input.ndim)), eps, False)
    else:
        statistics = [torch.zeros(0, dtype=input.dtype, device=input.device) for _ in range(2)]
    return F.batch_norm(input, mean, var, weight, bias, training, momentum, eps), *statistics


@form("_native_batch_norm_legit")
def batch_norm_legit(input: Tensor, weight: Any, bias: Any, *rest: Any) -> tuple[Tensor, ...]:
    """With running statistics, which it writes to, or without."""
    running = (None, None) if isinstance(rest[0], bool) else (rest[0], rest[1])
    return native_batch_norm(input, weight, bias, *running, *rest[-3:])


@form("_native_batch_norm_legit_functional")
def batch_norm_functional(
    input: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, training: bool, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    mean, var = mean.clone(), var.clone()
    return (*native_batch_norm(input, weight, bias, mean, var, training, momentum, eps), mean, var)


@form("_native_batch_norm_legit_no_training")
def batch_norm_no_training(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    return native_batch_norm(input, weight, bias, mean, var, False, momentum, eps)


@form("native_dropout")
def native_dropout(input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    kept = F.dropout(torch.ones_like(input), p, train is None or train)
    return input * kept, kept != 0


@form("_softmax")
def softmax(input: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    return torch.softmax(input, dim, dtype=torch.float32 if half_to_float else None)


@form("_log_softmax")
def log_softmax(input: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    return torch.log_softmax(input, dim, dtype=torch.float32 if half_to_float else None)


@form("_safe_softmax")
def safe_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """What is all minus infinity becomes 0."""
    nothing = (input == -math.inf).all(dim, keepdim=True)
    return torch.softmax(input, dim, dtype=dtype).masked_fill(nothing, 0.0)


@form("_scaled_dot_product_flash_attention_for_cpu")
def attention_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, **options: Any
) -> Results:
    mask, scale = options.get("attn_mask"), options.get("scale")
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, scale=scale)
    given = (query, key, value, dropout_p, is_causal)
    return Results(out, lambda: fallback(aten._scaled_dot_product_flash_attention_for_cpu, *given, **options)[1:])


@form("_scaled_dot_product_flash_attention")
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *more: Any,
    **options: Any,
) -> Results:
    out = F.scaled_dot_product_attention(query, key, value, None, dropout_p, is_causal, scale=options.get("scale"))
    given = (query, key, value, dropout_p, is_causal, *more)
    return Results(out, lambda: fallback(aten._scaled_dot_product_flash_attention, *given, **options)[1:])


def _biased(name: str) -> Form:
    """``_scaled_dot_product_efficient_attention`` and its like: a bias, and whether to return its log-sum-exp."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None,
        compute_log_sumexp: bool,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *more: Any,
        **options: Any,
    ) -> Results:
        scale = options.get("scale")
        out = F.scaled_dot_product_attention(query, key, value, attn_bias, dropout_p, is_causal, scale=scale)
        given = (query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, *more)
        return Results(out, lambda: fallback(getattr(aten, name), *given, **options)[1:])

    return attention


for _name in ("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"):
    FORMS[_name] = _biased(_name)
