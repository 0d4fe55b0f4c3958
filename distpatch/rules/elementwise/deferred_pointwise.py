"""Element-wise functions, deferred."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from distpatch.lazy.deferred_ops import OfRows, defer
from distpatch.lazy.recipe import MOST_HELD, Recipe
from distpatch.rules.core.executor import deferrable
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.tensor.rule_table import RULES
from distpatch.torch_utils.op_names import op_name

SMALL_BYTES = 1 << 20  # of a replicated operand, which is copied: it may be written to before it is used

# One result in its operand's order in memory, floating point in and out, and the same for any rows. Others, such as
# ``logsigmoid``, are computed at once.
NAMES = frozenset(
    """
    abs add addcdiv addcmul clamp clamp_max clamp_min clip cos div divide elu celu erf exp expm1 float double half
    bfloat16 gelu hardsigmoid hardswish hardtanh leaky_relu lerp log log1p maximum minimum mish mul
    multiply neg negative pow reciprocal relu relu6 rsqrt rsub selu sigmoid silu sin softplus softsign sqrt square
    sub subtract tanh true_divide radd rmul truediv rdiv rtruediv
    """.split()
)
_SAME = {"radd": "add", "rmul": "mul", "truediv": "div", "true_divide": "div", "divide": "div"}
_SAME |= {"multiply": "mul", "subtract": "sub", "negative": "neg", "clip": "clamp"}
_WITH_OUT = frozenset(
    "abs add addcdiv addcmul clamp clamp_max clamp_min cos div erf exp expm1 lerp log log1p maximum minimum mul neg "
    "pow reciprocal rsqrt sigmoid sin sqrt square sub tanh".split()
)


def defer_pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PatchTensor | None:
    """The result as a recipe; None where it is to be computed now."""
    form = _form(func)
    if form is None:
        return None
    function, has_inplace, out, in_place = form
    sharded = [arg for arg in args if isinstance(arg, PatchTensor)]
    if not sharded or any(isinstance(arg, Tensor) for arg in kwargs.values()):
        return None
    lead = max(sharded, key=lambda x: x.local_or_recipe.shape.numel())
    in_place = in_place or bool(kwargs.get("inplace"))
    if in_place and not (args[0] is lead and lead.is_deferred):
        return None
    kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
    values = [_small(arg, lead) if _is_plain(arg) else arg for arg in args]
    first = next(arg for arg in args if isinstance(arg, Tensor))  # it says how the result stands in memory
    if any(value is None or isinstance(value, (list, tuple)) for value in values):
        return None
    if (recipes := deferrable(sharded, lead, fused=True)) is None:
        return None
    if first.shape != lead.shape and recipes[0].format is not torch.contiguous_format:
        return None
    recipe = _recipe(function, values, kwargs, lead, has_inplace, out)
    if recipe is None:
        return None
    if recipe is lead.as_recipe:
        return lead
    if in_place:
        if (recipe.shape, recipe.dtype) != (lead.recipe.shape, lead.recipe.dtype):
            return None  # torch writes in the dtype that there is, and refuses another shape
        lead.recipe = recipe
        recipe.belong_to(lead)
        return lead
    return PatchTensor(recipe, lead.row_layout, lead.region)


def _is_plain(arg: Any) -> bool:
    return isinstance(arg, Tensor) and not isinstance(arg, PatchTensor)


@lru_cache(maxsize=1024)
def _form(func: Any) -> tuple[Any, bool, Any, bool] | None:
    """What to call, whether it knows ``inplace=``, the same with ``out=``; and whether it was to write in place."""
    name = op_name(func)
    in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    plain = name.strip("_")
    if in_place and name.startswith("__i"):
        plain = plain[1:]
    if plain not in NAMES or func not in RULES:  # somebody's own ``sigmoid`` is not torch's
        return None
    known = _SAME.get(plain, plain)
    if in_place:
        func = getattr(torch, known, None) or getattr(nn.functional, known, None)
        if func is None:
            return None
    try:
        has_inplace = "inplace" in inspect.signature(func).parameters
    except (TypeError, ValueError):
        has_inplace = False
    return func, has_inplace, getattr(torch, known) if known in _WITH_OUT else None, in_place


def _small(tensor: Tensor, lead: PatchTensor) -> Tensor | None:
    """A replicated operand that meets all rows alike, as it is now."""
    at = lead.row_layout.dim - lead.ndim
    tall = tensor.ndim >= -at and tensor.shape[at] != 1
    plain = type(tensor) in {Tensor, nn.Parameter}
    if tall or not plain or tensor.numel() * tensor.element_size() > SMALL_BYTES or tensor.ndim > lead.ndim:
        return None
    return tensor.detach().clone()


def _recipe(
    func: Any, values: list[Any], kwargs: dict[str, Any], lead: PatchTensor, has_inplace: bool, out: Any
) -> Recipe | None:
    places = [i for i, value in enumerate(values) if isinstance(value, PatchTensor)]
    parents = [values[i].as_recipe for i in places]
    given = [v.as_recipe.sample() if isinstance(v, PatchTensor) else v for v in values]
    sample = func(*given, **kwargs)
    if sample is given[places[0]]:  # such as to a dtype that it has
        return parents[0]
    row, shape = lead.row_layout.dim, list(sample.shape)
    if not sample.dtype.is_floating_point:
        return None
    shape[row] = lead.as_recipe.num_rows
    constants = [None if i in places else value for i, value in enumerate(values)]
    step = OfRows(func, constants, kwargs, places, has_inplace and places[0] == 0, out, sample, row)
    recipe = defer(op_name(func), parents, step, shape=shape, dtype=sample.dtype)
    return recipe if recipe.held_bytes <= MOST_HELD * recipe.size_bytes else None
