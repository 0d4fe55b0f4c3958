"""Operators of ``torch.ops.aten`` whose arguments or results are not those of the public function: what they compute.

Each takes the operator's own arguments and is made of functions that have rules. What torch offers publicly
under the same name and gave no rule yet (``torch.convolution``) gets these too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.rules.core.fallback import fallback
from distpatch.rules.core.registry import named, nth
from distpatch.tensor.patch_tensor import gather_replicated
from distpatch.tensor.rule_table import RULES, RuleEntry
from distpatch.torch_utils import private

Form = Callable[..., Any]
FORMS: dict[str, Form] = {}
aten: Any = torch.ops.aten


def form(*names: str) -> Callable[[Form], Form]:
    def register(function: Form) -> Form:
        FORMS.update(dict.fromkeys(names, function))
        return function

    return register


class Results(Sequence[Any]):
    """Results of which, but for the first, hardly anybody asks: statistics for a backward pass of its own.

    They are computed when somebody does, or takes them apart.
    """

    def __init__(self, first: Tensor, others: Callable[[], Sequence[Any]]) -> None:
        self._known, self._others = [first], others

    def __len__(self) -> int:
        return len(self._all())

    def __getitem__(self, at: Any) -> Any:
        return self._known[0] if at == 0 else self._all()[at]

    def _all(self) -> tuple[Any, ...]:
        if len(self._known) == 1:
            self._known += self._others()
        return tuple(self._known)


@form("convolution", "_convolution", "convolution_overrideable")
def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *_backend: Any,
) -> Any:
    spatial = weight.ndim - 2
    if transposed:
        transpose = getattr(F, f"conv_transpose{spatial}d")
        return transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return getattr(F, f"conv{spatial}d")(input, weight, bias, stride, padding, dilation, groups)


def _resized(mode: str, spatial: int, antialias: bool = False) -> Form:
    """``upsample_*``: of a size, of scale factors (``.vec``), or of a size and the scale of every dim."""
    aligns = "linear" in mode or mode == "bicubic"

    def resize(input: Tensor, output_size: Any, *how: Any, **more: Any) -> Any:
        align = None
        if aligns:
            align, how = (more.pop("align_corners"), how) if "align_corners" in more else (how[0], how[1:])
        given = [*how, *more.values()]
        scales = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else [n for n in given if n]
        options: dict[str, Any] = {"mode": mode, "align_corners": align, "antialias": antialias}
        if output_size is not None and len(scales or ()) < spatial:
            return F.interpolate(input, size=list(output_size), **options)
        made = [math.floor(n * scale) for n, scale in zip(input.shape[2:], scales)]
        if output_size is None or made == list(output_size):
            return F.interpolate(input, scale_factor=list(scales), **options)
        same = all(math.isclose(n / m, s, rel_tol=1e-12) for n, m, s in zip(output_size, input.shape[2:], scales))
        if same:
            return F.interpolate(input, size=list(output_size), **options)
        return fallback(
            _upsampling(mode, spatial, antialias), input, output_size, *([align] if aligns else []), *scales
        )

    return resize


def _upsampling(mode: str, spatial: int, antialias: bool) -> Any:
    exact = mode == "nearest-exact"
    name = "nearest_exact" if exact else mode
    return getattr(aten, f"{'_' if exact or antialias else ''}upsample_{name}{spatial}d{'_aa' if antialias else ''}")


for _mode, _dims in {
    "nearest": (1, 2, 3),
    "nearest-exact": (1, 2, 3),
    "linear": (1,),
    "bilinear": (2,),
    "bicubic": (2,),
    "trilinear": (3,),
}.items():
    for _spatial in _dims:
        FORMS[_upsampling(_mode, _spatial, False)._qualified_op_name[6:]] = _resized(_mode, _spatial)
for _mode in ("bilinear", "bicubic"):
    FORMS[f"_upsample_{_mode}2d_aa"] = _resized(_mode, 2, True)


def _padded(mode: str) -> Form:
    return lambda input, padding: F.pad(input, padding, mode)


for _spatial in (1, 2, 3):
    FORMS[f"reflection_pad{_spatial}d"] = _padded("reflect")
    FORMS[f"replication_pad{_spatial}d"] = _padded("replicate")
FORMS["_pad_circular"] = _padded("circular")


@form("constant_pad_nd")
def constant_pad(input: Tensor, pad: Sequence[int], value: float = 0) -> Any:
    return F.pad(input, pad, "constant", value)


@form("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def adaptive_avg_pool(input: Tensor, output_size: Any) -> Any:
    return getattr(F, f"adaptive_avg_pool{len(output_size)}d")(input, output_size)


@form("adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(input: Tensor, output_size: Any) -> Any:
    return getattr(F, f"adaptive_max_pool{len(output_size)}d")(input, output_size, True)


@form("im2col")
def im2col(input: Tensor, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    return F.unfold(input, kernel_size, dilation, padding, stride)


@form("col2im")
def col2im(input: Tensor, output_size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    return F.fold(input, output_size, kernel_size, dilation, padding, stride)


@form("slice")
def slice_(input: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return input[(slice(None),) * nth(dim, input.ndim) + (slice(start, end, step),)]


@form("index", "_unsafe_index")
def index(input: Tensor, indices: Sequence[Any]) -> Any:
    return input[tuple(slice(None) if item is None else item for item in indices)]


@form("_unsafe_index_put")
def unsafe_index_put(input: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Any:
    return torch.index_put(input, indices, values, accumulate)


@form("_index_put_impl_")
def index_put_(input: Tensor, indices: Any, values: Tensor, accumulate: bool = False, unsafe: bool = False) -> Any:
    return input.index_put_(indices, values, accumulate)


@form("embedding")
def embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    padding = padding_idx if padding_idx >= 0 else None
    return F.embedding(indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse)


@form("_to_copy")
def to_copy(input: Tensor, **how: Any) -> Any:
    return to(input, **how, copy=True)


@form("to")
def to(input: Tensor, *args: Any, **how: Any) -> Any:
    """Without what is torch's own to know: the layout, and whether memory is pinned."""
    kept = {key: value for key, value in how.items() if key not in {"layout", "pin_memory"} and value is not None}
    if args and args[-1] is None:  # a memory format
        args = args[:-1]
    return input.to(*args, **kept)


@form("alias", "_reshape_alias", "lift_fresh", "lift")
def alias(input: Tensor, *shape: Any) -> Any:
    return input.view(shape[0] if shape else input.shape)


@form("copy")
def copy(input: Tensor, src: Tensor, non_blocking: bool = False) -> Any:
    return input.clone().copy_(src, non_blocking)


@form("_local_scalar_dense", "item")
def item(input: Tensor) -> Any:
    return input.item()


@form("expand")
def expand(input: Tensor, size: Any, *, implicit: bool = False) -> Any:
    return input.expand(size)


def _with_alpha(function: Form) -> Form:
    return lambda input, other, alpha=1: function(input, other, alpha=alpha)


for _name in ("add", "sub", "subtract", "rsub"):
    FORMS[_name] = _with_alpha(getattr(torch, _name))
for _name in ("add_", "sub_", "subtract_"):
    FORMS[_name] = _with_alpha(getattr(Tensor, _name))


@form("_prelu_kernel")
def prelu(input: Tensor, weight: Tensor) -> Any:
    return torch.where(input > 0, input, weight * input)


@form("sym_size", "size")
def size(input: Tensor, dim: int | None = None) -> Any:
    return input.size() if dim is None else input.size(dim)


@form("sym_stride", "stride")
def stride(input: Tensor, dim: int | None = None) -> Any:
    return input.stride() if dim is None else input.stride(dim)


@form("sym_numel", "numel")
def numel(input: Tensor) -> int:
    return input.numel()


@form("len")
def length(input: Tensor) -> int:
    return len(input)


for _name in ("Int", "IntImplicit", "Float", "FloatImplicit", "Bool"):
    FORMS[_name] = {"I": int, "F": float, "B": bool}[_name[0]]
FORMS["ScalarImplicit"] = item


@form("sym_is_contiguous")
def is_contiguous(input: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
    return input.is_contiguous(memory_format=memory_format)


@form("_assert_tensor_metadata")
def assert_metadata(a: Tensor, size: Any = None, stride: Any = None, dtype: Any = None, **_: Any) -> None:
    """What an exported program asks of a tensor: its sizes, and its dtype. Strides are each rank's own."""
    if (size is not None and list(size) != list(a.shape)) or (dtype is not None and dtype != a.dtype):
        raise RuntimeError(f"a tensor of {size} and {dtype} was expected, got {tuple(a.shape)} and {a.dtype}")


@form("_weight_norm")
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    return private.weight_norm(gather_replicated(v), gather_replicated(g), dim)


def _public(function: Form) -> Callable[..., Any]:
    def rule(func: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return rule


def fill_in() -> None:
    """The same rules for what torch offers publicly under these names, and has none."""
    for name, function in FORMS.items():
        for public in named(name):
            if not RULES.has_rule(public) and hasattr(torch, name):
                RULES[public] = replace(RULES.get(public, RuleEntry()), rule=_public(function), any_order=True)
