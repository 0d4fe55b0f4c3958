"""Normalisation: statistics of the local rows, merged in one small collective; the rest is local."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.rules.core.executor import may_pay
from distpatch.rules.core.operands import PLAIN, autocast, precise, replicated_operand
from distpatch.rules.core.redistribution import along_rows
from distpatch.rules.core.registry import R, named, rule
from distpatch.rules.core.wrapping import beside_rows, wrap
from distpatch.rules.reductions.moments import Norm
from distpatch.rules.reductions.normalize import normalize, normalize_rows
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.tensor.row_copy import RowCopy
from distpatch.torch_utils.memory_format import memory_format
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors

_NEVER = frozenset({type(None), int, float, bool, tuple, *PLAIN})  # types of arguments that are not sharded
_RUNNING = ("running_mean", "running_var")


def norm_rule(*funcs: Any, **properties: Any) -> Callable[[R], R]:
    """A rule for a sharded input. Sharded parameters are gathered; running statistics stay, as they are written to."""

    def register(handler: R) -> R:
        def checked(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
            sharded = isinstance(input, PatchTensor)
            if _any_sharded(args) or (kwargs and _any_sharded(kwargs.values())):
                running = 2 if op_name(func) in {"batch_norm", "instance_norm"} else 0
                if not sharded and running and _writes(func, args, kwargs):
                    refuse_sharded(func, [*args[:2], *(kwargs.get(name) for name in _RUNNING)])
                kept, names = (running, _RUNNING) if sharded else (0, ())
                args = (*args[:kept], *map_tensors(gather_replicated, args[kept:]))
                kwargs = {key: t if key in names else map_tensors(gather_replicated, t) for key, t in kwargs.items()}
            return (handler if sharded else _plain)(func, input, *args, **kwargs)

        rule(*funcs, any_order=True, asks_if_empty=True, **properties)(checked)
        return handler

    return register


def _any_sharded(given: Collection[Any]) -> bool:
    for one in given:  # a generator would take longer
        if type(one) in _NEVER:
            continue
        if isinstance(one, (PatchTensor, RowCopy)):
            return True
    return False


def _plain(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a batch or instance norm writes to its running statistics."""
    default = op_name(func) == "instance_norm"
    return bool(args[4] if len(args) > 4 else kwargs.get("training", kwargs.get("use_input_stats", default)))


def refuse_sharded(func: Any, running: Sequence[Tensor | None]) -> None:
    if any(isinstance(t, PatchTensor) for t in running):
        raise UnsupportedOpError(
            f"{op_name(func)} would write to gathered copies of the running statistics {running}: gather them first"
        )


def _local(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> PatchTensor:
    """Where no statistic crosses rows: on the local ones, with the other tensors replicated."""
    args, kwargs = map_tensors(lambda t: replicated_operand(gather_replicated(t), input), (args, kwargs))
    return beside_rows(func, input, *args, **kwargs)


def _fixed(func: Any, input: PatchTensor, *args: Any) -> PatchTensor:
    """By statistics that are given.

    The gradient is handed on in the memory format that torch sees in it: its CPU kernel takes that of a batch
    of one that was flattened and transposed, whose strides fit two formats, for the other one (seen in 2.13).
    """
    result = _local(func, input, *args)
    if result.local.requires_grad and not torch.compiler.is_compiling():
        result.local.register_hook(lambda grad: grad.contiguous(memory_format=memory_format(grad)))
    return result


def _norm(func: Any, input: PatchTensor, groups: int, eps: float) -> Norm:
    return _known(groups, eps, input.row_layout, input.region.comm.name, op_name(func))


_known = lru_cache(maxsize=4096)(Norm)


@norm_rule(*named("group_norm"), keeps_format=True)
def group_norm(
    func: Any,
    input: PatchTensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *cudnn: Any,
) -> Any:
    input = along_rows(input, func)
    if input.row_layout.dim == 0:  # torch's own, which does not ask how many samples a rank has
        return _local(torch.group_norm, input, num_groups, weight, bias, eps, *cudnn)
    if input.world_size == 1 and not may_pay(input):
        affine = (t if t is None else replicated_operand(t, input) for t in (weight, bias))
        alone = _alone_in_a_graph if torch.compiler.is_compiling() else func
        return beside_rows(alone, input, num_groups, *affine, eps, *cudnn)
    if input.row_layout.dim == 1 or input.shape[1] % num_groups:
        return NotImplemented
    input = autocast(input, lambda t: func(t.expand(1, 1, 2), 1))
    return normalize_rows(input, weight, bias, _norm(func, input, num_groups, eps))[0]


def _alone_in_a_graph(rows: Tensor, *args: Any) -> Tensor:
    """Pixels as one dim: torch's kernel refuses images of a batch of one whose strides are not those of the trace.

    As they are after a view of channels-last tokens (``torch.compile(backend="aot_eager")``, also of plain torch; seen
    in 2.13).
    """
    if rows.ndim < 4:
        return torch.group_norm(rows, *args)
    normalized = torch.group_norm(rows.flatten(2), *args).view(rows.shape)
    return normalized.contiguous(memory_format=memory_format(rows))


@norm_rule(F.batch_norm, keeps_format=True)
def batch_norm(
    func: Any,
    input: PatchTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    input = along_rows(input, func)
    if input.row_layout.dim == 1:
        if training:
            refuse_sharded(func, (running_mean, running_var))
        return NotImplemented
    if not training:
        return _fixed(func, input, running_mean, running_var, weight, bias, False, momentum, eps)
    F._verify_batch_size(list(input.shape))  # type: ignore[attr-defined]
    rows = input.local.unsqueeze(-1) if input.ndim == 2 else input.local
    norm = _norm(func, input, 0, eps)
    out, mean, spread = normalize(rows, weight, bias, norm)
    keep_running(running_mean, running_var, mean, norm.variance(spread), norm.count(rows), momentum)
    return wrap(out.squeeze(-1) if input.ndim == 2 else out, input)


@norm_rule(F.instance_norm, of_many_kernels=True)
def instance_norm(
    func: Any,
    input: PatchTensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    input = along_rows(input, func)
    stats = (running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if input.row_layout.dim == 1 or (input.row_layout.dim == 0 and running_mean is not None and use_input_stats):
        if use_input_stats:
            refuse_sharded(func, (running_mean, running_var))
        return NotImplemented
    if not use_input_stats or input.row_layout.dim == 0:
        return _fixed(func, input, *stats)
    F._verify_spatial_size(list(input.shape))  # type: ignore[attr-defined]
    norm = _norm(func, input, input.shape[1], eps)
    out, mean, spread = normalize_rows(input, weight, bias, norm)
    count = norm.count(input.local_or_recipe)
    keep_running(running_mean, running_var, mean, norm.variance(spread), count, momentum)
    return out


@torch.no_grad()
def keep_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, count: Any, momentum: float
) -> None:
    """Move the running statistics, the same on all ranks, towards these; the variance is the unbiased one.

    ``count``: of samples, a number or a tensor of no dims.
    """
    for running, now in ((running_mean, mean.mean(0)), (running_var, var.mean(0) * (count / (count - 1)))):
        if running is not None:
            running.copy_(running.to(now.dtype).lerp(now, momentum))


@rule(torch.batch_norm, any_order=True, asks_if_empty=True)
@rule(torch.instance_norm, any_order=True, asks_if_empty=True, of_many_kernels=True)
def builtin_norm(func: Any, input: PatchTensor, weight: Any, bias: Any, mean: Any, var: Any, *args: Any) -> Any:
    """torch's own have other orders of arguments than those of ``nn.functional``."""
    return getattr(F, op_name(func))(input, mean, var, weight, bias, *args[:3])


@norm_rule(*named("layer_norm", "rms_norm"))
def over_last_dims(func: Any, input: PatchTensor, normalized_shape: Any, *args: Any, **kwargs: Any) -> Any:
    first = input.ndim - len(normalized_shape)
    if input.row_layout.dim < first or input.world_size == 1:
        return _local(func, input, normalized_shape, *args, **kwargs)
    if input.shape[first:] != tuple(normalized_shape):
        return NotImplemented
    input = autocast(input, lambda t: func(t, (1,)))
    of = _layer_norm if op_name(func) == "layer_norm" else _rms_norm
    return of(input, first, *args, **kwargs).to(input.dtype)


def _layer_norm(
    x: PatchTensor, first: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *cudnn: Any
) -> Tensor:
    """As a norm of one group of one channel, in whose place stand the samples."""
    if x.region.inner is not None:  # which would have to be merged with the samples
        of_rows, dims = x.to(precise(x.dtype)), tuple(range(first, x.ndim))
        centred = of_rows - of_rows.mean(dims, keepdim=True)
        return _affine(centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps), weight, bias)
    local = x.local.to(precise(x.dtype))
    samples = local.reshape(math.prod(local.shape[:first]), 1, *local.shape[first:])
    norm = Norm(1, eps, x.row_layout.with_dim(x.row_layout.dim - first + 2), x.comm.name, "layer_norm")
    return _affine(wrap(normalize(samples, None, None, norm)[0].view(local.shape), x), weight, bias)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _rms_norm(x: Tensor, first: int, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    x = x.to(precise(x.dtype))
    mean_square = x.square().mean(tuple(range(first, x.ndim)), keepdim=True)
    return _affine(x * torch.rsqrt(mean_square + (torch.finfo(x.dtype).eps if eps is None else eps)), weight, None)


@rule(F.local_response_norm)
def local_response_norm(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> Any:
    """Over neighbouring channels of a pixel."""
    input = along_rows(input, func)
    if input.row_layout.dim == 1:
        return NotImplemented
    return _local(func, input, *args, **kwargs)
