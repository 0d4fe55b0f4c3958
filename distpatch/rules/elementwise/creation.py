"""Tensors made like a sharded one, and random ones with the values of one device.

Every rank draws the random numbers of the whole tensor, from generators that stand alike on all ranks, and
keeps its own rows of them (random_rows.py). Activations are not gathered for that.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from distpatch.layout.rows import RowLayout
from distpatch.rules.core.operands import local_rows_of, local_slice, sizes_of
from distpatch.rules.core.redistribution import alike_inside
from distpatch.rules.core.registry import named, rule
from distpatch.rules.core.wrapping import dim_order, wrap
from distpatch.rules.elementwise.pointwise import pointwise
from distpatch.rules.elementwise.random_rows import Draw, drawn_rows, own_rows
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.chunk_sizes import kind_of
from distpatch.torch_utils.op_names import op_name


@rule(*named("zeros_like", "ones_like", "empty_like", "full_like"), any_order=True)
def like(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> PatchTensor:
    return wrap(func(input.local, *args, **kwargs), input)


@rule(*named("new_tensor", "new_empty_strided"), torch.Tensor.new, any_order=True)
def new(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = func(input.local, *args, **kwargs)
    return result


@rule(*named("new_zeros", "new_ones", "new_empty", "new_full"), any_order=True)
def new_of_size(func: Any, input: PatchTensor, *size: Any, **kwargs: Any) -> Tensor:
    """A size that the caller computes is global; an image is sharded as the input is, all else replicated."""
    fill = {"fill_value": size[1]} if op_name(func) == "new_full" and len(size) > 1 else {}
    shape = list(sizes_of(size[:1] if fill else size, kwargs, "size"))
    dim = input.row_layout.dim
    kwargs = {**fill, **{name: value for name, value in kwargs.items() if name != "size"}}
    if len(shape) != input.ndim or input.ndim < 4 or shape[dim] <= 1:
        return cast(Tensor, func(input.local, shape, **kwargs))
    same = shape[dim] == input.row_layout.size
    layout = input.row_layout if same else RowLayout(dim, input.region.bounds(shape[dim]))
    shape[dim] = layout.heights[input.rank]
    return wrap(func(input.local, shape, **kwargs), input, layout)


def _whole_like(x: PatchTensor) -> Tensor:
    """An uninitialised tensor of the global shape, dense in the memory order of the rows: that of the draws."""
    return torch.empty_permuted(x.shape, dim_order(x)[::-1], dtype=x.dtype, device=x.device)


def _drawing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Draw, Any]:
    """What draws by a function of torch, and by what it is known; of draws on a device of their own, nothing."""
    known = tuple(sorted((name, value) for name, value in kwargs.items() if name != "generator"))
    key = (op_name(func), args, known) if kwargs.get("device") is None else None
    return lambda t, **generator: func(t, *args, **{**kwargs, **generator}), key


@rule(*named("rand_like", "randn_like", "randint_like"))
def random_like(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> PatchTensor:
    requires_grad = kwargs.pop("requires_grad", False)
    draw, key = _drawing(func, args, kwargs)
    return wrap(drawn_rows(draw, input, key=key).requires_grad_(requires_grad), input)


@rule(*named("normal_", "uniform_", "exponential_", "random_", "cauchy_", "log_normal_", "geometric_"))
def draw_(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> PatchTensor:
    draw, key = _drawing(func, args, kwargs)
    input.local.copy_(drawn_rows(draw, input, key=key))
    return input


@rule(*(getattr(torch.nn.init, name) for name in ("normal_", "uniform_", "constant_", "kaiming_uniform_")))
def initialize(func: Any, *args: Any, **kwargs: Any) -> PatchTensor:
    """By the shape of the whole."""
    x, args = (args[0], args[1:]) if args else (kwargs.pop("tensor"), ())
    full = func(_whole_like(x), *args, **kwargs)
    with torch.no_grad():
        x.local.copy_(local_slice(full, x, x.row_layout.dim))
    return x


@rule(*named("bernoulli", "bernoulli_"))
def bernoulli(func: Any, input: PatchTensor, p: Any = None, **kwargs: Any) -> Any:
    """One draw for an element, whatever its probability."""
    if not isinstance(input, PatchTensor):
        return NotImplemented
    if isinstance(p, (int, float)):
        draw, key = _drawing(torch.Tensor.bernoulli_, (p,), kwargs)
        rows = drawn_rows(draw, input, key=key)
        return wrap(rows, input) if not op_name(func).endswith("_") else _written(input, rows)
    if isinstance(p, Tensor):
        _, p = alike_inside([input, p.expand(input.shape)], func)
        p = _placed(local_rows_of(p, input, input.row_layout.dim - input.ndim, func), input)
    drawn = func(_placed(input.local, input), *(() if p is None else (p,)), **kwargs)
    if not op_name(func).endswith("_"):
        return wrap(own_rows(drawn, input), input)
    return _written(input, local_slice(drawn, input, input.row_layout.dim))


def _written(x: PatchTensor, rows: Tensor) -> PatchTensor:
    x.local.copy_(rows)
    return x


@rule(torch.normal)
def normal(func: Any, mean: Any, std: Any = 1.0, *, generator: Any = None, out: Any = None) -> Any:
    """Standard normal numbers in the order of the dims, scaled and moved."""
    shape = torch.broadcast_shapes(*(t.shape for t in (mean, std) if isinstance(t, Tensor)))
    lead = next(t for t in (mean, std) if isinstance(t, PatchTensor))
    if lead.shape != shape or out is not None:
        return NotImplemented
    drawn = torch.empty(shape, dtype=lead.dtype, device=lead.device).normal_(generator=generator)
    with torch.no_grad():
        return wrap(own_rows(drawn, lead), lead) * std + mean


def _placed(local: Tensor, x: PatchTensor) -> Tensor:
    """A tensor of the global shape with this rank's rows in their place, and zeros elsewhere.

    For functions that draw as many numbers for each element, whatever its value.
    """
    full = torch.empty_permuted(x.shape, dim_order(x)[::-1], dtype=local.dtype, device=local.device).zero_()
    place = local_slice(full, x, x.row_layout.dim)
    while isinstance(local, PatchTensor):
        place, local = local_slice(place, local, local.row_layout.dim), local.local
    place.copy_(local)
    return full


_OF_CHANNELS = frozenset("dropout1d dropout2d dropout3d feature_dropout feature_dropout_".split())


@rule(*named("dropout", "dropout_", *_OF_CHANNELS), any_order=True)
@rule(*named("alpha_dropout", "alpha_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_"))
def dropout(
    func: Any, input: PatchTensor, p: float = 0.5, training: bool | None = None, inplace: bool = False, **kwargs: Any
) -> Any:
    """Nothing in evaluation; in training the mask of a single device, found by dropping from ones."""
    name = op_name(func)
    alpha = "alpha" in name
    if not kwargs.get("train", not alpha if training is None else training) or p == 0:
        return input if input.is_deferred else pointwise(func, input, p, False, *([inplace] if inplace else []))
    if alpha:
        result = own_rows(func(_placed(input.local, input), p, True), input)
    else:
        result = input.local * _kept(func, input, p) * (1 / (1 - p) if p < 1 else 0.0)
    if not (inplace or name.endswith("_")):
        return wrap(result, input)
    return _written(input, result)


@torch.no_grad()
def _kept(func: Any, x: PatchTensor, p: float) -> Tensor:
    """Which elements stay, or which channels of a sample, as a whole. A sample alone has no batch dim."""
    if op_name(func) not in _OF_CHANNELS:
        if p < 1 and kind_of(x.device) == "cpu" and not torch.compiler.is_compiling():  # as torch's own does there
            draw, key = _drawing(torch.Tensor.bernoulli_, (1 - p,), {})
            return drawn_rows(draw, x, key=key) != 0
        return own_rows(func(_whole_like(x).fill_(1), p, True) != 0, x)
    alone = (op_name(func), x.ndim) in {("dropout1d", 2), ("dropout3d", 4)}
    shape = [n if d < 2 - alone else 1 for d, n in enumerate(x.shape)]
    keep = func(torch.ones(shape, dtype=x.dtype, device=x.device), p, True) != 0
    return own_rows(keep, x) if x.row_layout.dim < 2 - alone else keep


@rule(*named("rrelu", "rrelu_"))
def rrelu(func: Any, input: PatchTensor, *args: Any, **kwargs: Any) -> Any:
    """In training a number is drawn for each negative element only: it takes all of them to know which."""
    training = kwargs.get("training", args[2] if len(args) > 2 else False)
    return NotImplemented if training else pointwise(func, input, *args, **kwargs)
