"""Losses: of each element on the rows where it is, then summed or averaged over all of them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.rules.core.operands import local_rows_of
from distpatch.rules.core.registry import rule
from distpatch.rules.core.wrapping import wrap
from distpatch.rules.elementwise.pointwise import pointwise
from distpatch.tensor.patch_tensor import PatchTensor


def _reduced(loss: Tensor, reduction: str, count: Any) -> Tensor:
    """``count``: what a mean divides by."""
    if reduction not in {"none", "sum", "mean", "batchmean"}:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / count


@rule(
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.kl_div),
    *(F.binary_cross_entropy_with_logits, F.soft_margin_loss, F.poisson_nll_loss),
)
def of_elements(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What compares two tensors element by element. A weight that changes what is averaged takes the fallback."""
    given = inspect.signature(func).bind(*args, **kwargs).arguments
    input, target, reduction = given.pop("input"), given.pop("target"), given.pop("reduction", "mean")
    lead = next((t for t in (input, target) if isinstance(t, PatchTensor)), None)
    averages = given.get("weight") is not None and not func.__name__.startswith("binary")
    if lead is None or averages or not given.pop("size_average", None) is given.pop("reduce", None) is None:
        return NotImplemented
    if input.shape == target.shape:  # nothing is broadcast, on an idle rank neither
        dim = lead.row_layout.dim - lead.ndim
        input, target = (wrap(local_rows_of(t, lead, dim, func), lead) for t in (input, target))
    loss = pointwise(func, input, target, **given, reduction="none")
    return _reduced(loss, reduction, len(input) if reduction == "batchmean" else loss.numel())


@rule(F.cross_entropy, F.nll_loss, asks_if_empty=True)
def of_classes(
    func: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``input``: (N, C, ...) or (C,); ``target``: classes, or for ``cross_entropy`` as many probabilities."""
    if size_average is not None or reduce is not None or (label_smoothing and weight is not None):
        return NotImplemented
    dim = min(input.ndim - 1, 1)
    logs, classes = input if func is F.nll_loss else torch.log_softmax(input, dim), input.shape[dim]
    if func is F.cross_entropy and target.is_floating_point():
        target = target * (1 - label_smoothing) + label_smoothing / classes if label_smoothing else target
        logs = logs if weight is None else logs * weight.view(-1, *[1] * (logs.ndim - dim - 1))
        loss = -(logs * target).sum(dim)
        return _reduced(loss, reduction, loss.numel())
    loss, weights = _of_classes(logs, target, weight, ignore_index, dim)
    if label_smoothing:
        smooth = torch.where(target == ignore_index, 0.0, -logs.sum(dim))
        loss = loss * (1 - label_smoothing) + smooth * (label_smoothing / classes)
    return _reduced(loss, reduction, weights.sum())


def _of_classes(logs: Tensor, target: Tensor, weight: Tensor | None, ignored: int, dim: int) -> tuple[Tensor, Tensor]:
    """The loss of each pixel, and its weight: that of its class, or 0."""
    seen = target != ignored
    chosen = target.where(seen, 0)
    weights = (logs.new_ones(()) if weight is None else weight[chosen]) * seen
    losses = -logs.gather(dim, chosen.unsqueeze(dim)).squeeze(dim) * weights
    return torch.where(seen, losses, 0.0), weights  # of a class that cannot be, 0 times infinity
