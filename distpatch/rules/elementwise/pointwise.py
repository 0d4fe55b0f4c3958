"""Element by element: the same function on the local rows, everything else brought to those rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.rules.core.aliasing import mutates, written_tensors
from distpatch.rules.core.executor import may_pay
from distpatch.rules.core.fresh_buffers import shard_like
from distpatch.rules.core.operands import local_operand, local_slice, replicated_operand
from distpatch.rules.core.registry import named, rule, written
from distpatch.rules.core.wrapping import wrap
from distpatch.rules.elementwise.deferred_pointwise import defer_pointwise
from distpatch.tensor.halo_rows import HaloRows, apply_beside, brought
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.tensor.rule_table import RULES, RuleEntry
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors, tensors_in


def pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The rule of every element-wise function; broadcasting follows the global shapes."""
    lead: PatchTensor | None = None
    alike = True
    for arg in args:
        if type(arg) is PatchTensor:
            if lead is None:
                lead = arg
            elif not _are_alike(arg, lead):
                alike = False
                break
        elif isinstance(arg, (Tensor, list, tuple)):
            alike = False
            break
    if kwargs and alike:
        for arg in kwargs.values():
            alike = alike and not isinstance(arg, Tensor)
    if lead is not None:
        if lead.halo_rows is not None and (halo := brought(lead)) is not None:
            return _beside_halo(halo, lead, alike, func, args, kwargs)
        return _of_rows(lead, alike, func, args, kwargs)
    return _broadcast(func, args, kwargs)


def _of_rows(lead: PatchTensor, alike: bool, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``alike``: all operands are sharded as the lead is, or numbers."""
    if may_pay(lead) and (later := defer_pointwise(func, args, kwargs)) is not None:
        return later
    if alike:
        result = func(*[arg.local if type(arg) is PatchTensor else arg for arg in args], **kwargs)
        if type(result) is Tensor and result is not lead.local and result.ndim == lead.ndim:
            return PatchTensor(result, lead.row_layout, lead.region)
        return _wrap(result, lead, lead.row_layout.dim - lead.ndim)
    return _broadcast(func, args, kwargs)


def _beside_halo(halo: HaloRows, lead: PatchTensor, alike: bool, func: Any, args: Any, kwargs: Any) -> Any:
    """The same is made of the rows of others."""
    of_halo = apply_beside(func, args, kwargs, lead, halo)
    if args[0] is lead and mutates(func, args, kwargs) is lead:
        lead.halo_rows = None
    return of_halo(_of_rows(lead, alike, func, args, kwargs))


def _are_alike(one: PatchTensor, other: PatchTensor) -> bool:
    rows, others = one.row_layout, other.row_layout
    alike = (rows is others or rows == others) and len(one._shape) == len(other._shape)
    return alike and one.region.comm is other.region.comm


def _broadcast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operands of different layouts, or sharded beside replicated ones.

    The operand with the most rows leads. A plain operand as tall as it is sliced; one of height 1, or
    without that dim, is used as it is; a sharded one of height 1 is gathered first.
    """
    tensors = list(tensors_in((args, kwargs)))
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    sharded = [t for t in tensors if isinstance(t, PatchTensor)]
    tall = [t for t in sharded if t.row_layout.size == shape[t.row_layout.dim - t.ndim]]
    if not tall:  # a sharded dim of size 1 is itself broadcast
        return func(*map_tensors(gather_replicated, args), **map_tensors(gather_replicated, kwargs))
    written = written_tensors(func, args, kwargs)
    if not written and (target := mutates(func, args, kwargs)) is not None:  # sharded values into a replicated tensor
        if isinstance(target, Tensor) and target.shape == shape and shard_like(target, tall[0]):
            return _broadcast(func, args, kwargs)
        return func(*map_tensors(gather_replicated, args), **map_tensors(gather_replicated, kwargs))
    lead = written[0] if written else tall[0]
    if lead.row_layout.size != shape[lead.row_layout.dim - lead.ndim] or any(
        t.row_layout != lead.row_layout for t in written
    ):
        raise UnsupportedOpError(
            f"{op_name(func)} in place on {', '.join(map(repr, written))} cannot take operands that broadcast "
            f"to {tuple(shape)}; several results must be sharded alike"
        )
    dim = lead.row_layout.dim - lead.ndim  # counted from the back, as broadcasting does

    def to_rows(tensor: Tensor) -> Tensor:
        return local_operand(tensor, lead, dim, func)

    return _wrap(func(*map_tensors(to_rows, args), **map_tensors(to_rows, kwargs)), lead, dim)


def _wrap(result: Any, lead: PatchTensor, dim: int) -> Any:
    """Results as PatchTensors; an in-place function returns the wrapper it was called on."""
    if isinstance(result, Tensor):
        if result is lead.local:
            return written(lead)
        return PatchTensor(result, lead.row_layout.with_dim(result.ndim + dim), lead.region)
    if isinstance(result, (tuple, list)):
        return type(result)(_wrap(item, lead, dim) for item in result)
    return result


@rule(*named("detach_"))
def detach_(func: Any, input: PatchTensor) -> PatchTensor:
    """The rows may be a view where the whole is none, and no view can be detached in place."""
    input.local = input.local.detach()
    return input


_NAMES = """
    abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2
    arctanh asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor bfloat16 bool byte ceil celu char clamp clamp_max clamp_min clip
    clone conj conj_physical copy copysign cos cosh deg2rad detach digamma div divide double elu
    eq erf erfc erfcx erfinv exp exp2 expit expm1 fill fix float float_power floor floor_divide fmax fmin
    fmod frac frexp gcd ge gelu greater greater_equal gt half hardshrink hardsigmoid hardswish hardtanh
    heaviside hypot i0 i0e i1 i1e imag int isclose isfinite isinf isnan isneginf isposinf isreal lcm
    ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2 log_ndtr logaddexp logaddexp2
    logical_and logical_not logical_or logical_xor logit logsigmoid long lt masked_fill maximum minimum
    mish mul multiply mvlgamma nan_to_num ndtr ndtri ne neg negative nextafter not_equal polygamma
    positive pow psi rad2deg real reciprocal relu relu6 remainder resolve_conj resolve_neg round rsqrt
    rsub selu sgn short sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign sqrt square
    sub subtract tan tanh tanhshrink threshold true_divide trunc xlog1py xlogy zero zeta
    __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__
    __rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__ __floordiv__ __rfloordiv__ __ifloordiv__
    __mod__ __rmod__ __imod__ __pow__ __rpow__ __ipow__ __neg__ __pos__ __abs__ __invert__ __and__
    __rand__ __iand__ __or__ __ror__ __ior__ __xor__ __rxor__ __ixor__ __lshift__ __rlshift__
    __ilshift__ __rshift__ __rrshift__ __irshift__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    alias_copy detach_copy cfloat cdouble chalf complex polar igamma igammac gammainc gammaincc gammaln
    multigammaln entr airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 modified_bessel_i0 modified_bessel_i1
    modified_bessel_k0 modified_bessel_k1 scaled_modified_bessel_k0 scaled_modified_bessel_k1
    spherical_bessel_j0 chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v
    chebyshev_polynomial_w hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l
    legendre_polynomial_p shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u
    shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w fake_quantize_per_tensor_affine
""".split()

_VIEWS = {"detach", "real", "imag", "conj", "resolve_conj", "positive"}
_PROMOTE_NUMBERS = set(
    """
    add sub subtract rsub mul multiply div divide true_divide eq ne lt le gt ge __add__ __radd__ __sub__ __rsub__
    __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    """.split()
)


def _register() -> None:
    """Some functions have several names (``__rdiv__``), and ``detach_`` has a rule of its own."""
    for name in _NAMES:
        facts = {"view": name in _VIEWS, "promotes_numbers": name in _PROMOTE_NUMBERS}
        getters = [getattr(torch.Tensor, name).__get__] if name in {"real", "imag"} else []
        in_place = [] if name.startswith("__") else named(f"{name}_")
        for func in (*getters, *named(name)):
            if func not in RULES:
                RULES[func] = RuleEntry(pointwise, any_order=True, elementwise=True, **facts)
        for func in in_place:
            if func not in RULES:
                RULES[func] = RuleEntry(pointwise, any_order=True, elementwise=True)


_register()


@rule(*named("where"))
def where(func: Any, condition: Tensor, *others: Any, **kwargs: Any) -> Any:
    """With a condition alone, the places where it is true."""
    return pointwise(func, condition, *others, **kwargs) if others or kwargs else NotImplemented


@rule(*named("isin", "bucketize"))
def looked_up(func: Any, elements: Tensor, values: Any, *args: Any, **kwargs: Any) -> Any:
    """Each element by itself, in a replicated table."""
    if not isinstance(elements, PatchTensor):
        return func(elements, gather_replicated(values), *args, **kwargs)
    values = gather_replicated(values) if isinstance(values, Tensor) else values
    return wrap(func(elements.local, values, *args, **kwargs), elements)


@rule(*named("prelu"))
def prelu(func: Any, input: PatchTensor, weight: Tensor) -> PatchTensor:
    """A weight for each channel, dim 1, or one for all."""
    weight = replicated_operand(gather_replicated(weight), input)
    if input.row_layout.dim == 1 and weight.numel() > 1:
        weight = local_slice(weight, input, 0)
    return wrap(func(input.local, weight), input)
