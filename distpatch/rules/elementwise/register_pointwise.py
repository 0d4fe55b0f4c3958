"""Element-wise functions of one's own: Triton kernels, operators of ``torch.library``, ``autograd.Function`` s."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from distpatch.errors import UnsupportedOpError
from distpatch.lazy.row_patches import with_dummy_row
from distpatch.rules.core.aliasing import mutates
from distpatch.rules.core.registry import keys
from distpatch.rules.elementwise.pointwise import pointwise
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.tensor.rule_table import RULES, RuleEntry
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors, tensors_in

T = TypeVar("T")


def register_pointwise(func: T) -> T:
    """Say that a function computes element by element, so that every rank may call it with its own rows.

    ``func``: an operator (``torch.library.custom_op``, or of ``torch.ops``: all its overloads), a subclass of
    ``torch.autograd.Function``, or a Python function, such as the launcher of a Triton kernel. Its tensor
    arguments are broadcast together as those of ``torch.add`` are, and its results have their shape. Returns
    ``func``, or in place of a Python function one that asks for the rule: use it as a decorator, or keep what
    it returns. See docs/own-functions.md.
    """
    on_rows = _on_rows(func)

    def rule(_func: Any, *args: Any, **kwargs: Any) -> Any:
        result = pointwise(on_rows, *args, **kwargs)
        for tensor in tensors_in(result):
            _check(func, tensor)
        return result

    for key in keys(func):
        RULES[key] = RuleEntry(rule, any_order=True)
    return cast(T, _asking(func)) if inspect.isfunction(func) else func


def _asking(func: Any) -> Any:
    @functools.wraps(func)
    def asking(*args: Any, **kwargs: Any) -> Any:
        tensors = tuple(tensors_in((args, kwargs)))
        if has_torch_function(tensors):
            return handle_torch_function(func, tensors, *args, **kwargs)
        return func(*args, **kwargs)

    return asking


def _on_rows(func: Any) -> Any:
    """The function, which an idle rank calls with one blank row, since kernels refuse to be launched for none."""
    func = getattr(func, "apply" if isinstance(func, type) else "_opoverload", func)

    @functools.wraps(func)
    def on_rows(*args: Any, **kwargs: Any) -> Any:
        empty = next((t for t in tensors_in((args, kwargs)) if t.numel() == 0), None)
        if empty is None or mutates(func, args, kwargs) is not None:
            return func(*args, **kwargs)
        dim = list(empty.shape).index(0) - empty.ndim

        def filled(tensor: Tensor) -> Tensor:
            return tensor if tensor.ndim < -dim else with_dummy_row(tensor, dim, 1)

        result = func(*map_tensors(filled, args), **map_tensors(filled, kwargs))
        return map_tensors(lambda t: t.narrow(dim, 0, 0), result)

    return on_rows


def _check(func: Any, result: Tensor) -> None:
    if not isinstance(result, PatchTensor):
        return
    rows = result.row_layout.heights[result.rank]
    if result.local.shape[result.row_layout.dim] != rows:
        raise UnsupportedOpError(
            f"{op_name(func)} was registered as element-wise, but makes a tensor of shape "
            f"{tuple(result.local.shape)} of {rows} rows: give it a rule (distpatch.register_rule)"
        )
