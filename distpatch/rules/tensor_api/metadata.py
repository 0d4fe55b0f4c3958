"""What a PatchTensor says of itself and of its gradient, and what it cannot say."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.rules.core.aliasing import copied, memory_of, strides_unambiguous
from distpatch.rules.core.executor import run_rows
from distpatch.rules.core.operands import local_rows_of
from distpatch.rules.core.registry import named, rule
from distpatch.rules.core.wrapping import dense_strides_of, wrap
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated
from distpatch.tensor.rule_table import Rule
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.private import DisableTorchFunctionSubclass, is_compiling
from distpatch.torch_utils.tree import tensors_in


def _getters(*names: str) -> list[Any]:
    return [getattr(torch.Tensor, name).__get__ for name in names if hasattr(torch.Tensor, name)]


_TOLD_BY_WRAPPER = """
    dtype device layout is_cuda is_cpu is_sparse is_quantized is_meta is_mkldnn is_xpu is_mps
    is_nested itemsize names is_sparse_csr is_xla is_ipu is_vulkan is_maia is_mtia name _base
""".split()


# The wrapper itself has the dtype and device of the rows.
@rule(
    *named("element_size", "is_floating_point", "is_complex", "is_signed"),
    *named("get_device", "is_conj", "is_neg", "__dir__", "_is_view"),
    *_getters(*_TOLD_BY_WRAPPER),
    any_order=True,
)
def from_wrapper(func: Any, *args: Any, **kwargs: Any) -> Any:
    with DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _on_local(func: Any, x: PatchTensor, *args: Any, **kwargs: Any) -> PatchTensor:
    func(x.local, *args, **kwargs)
    return x


def _stride(func: Any, x: PatchTensor, dim: int | None = None) -> Any:
    """Strides that the global tensor would have.

    While a graph is compiled the wrapper's own, which its guards see.
    """
    if is_compiling():
        return from_wrapper(func, x) if dim is None else from_wrapper(func, x, dim)
    strides = dense_strides_of(x)
    return strides if dim is None else strides[dim]


_ANSWERS: list[tuple[list[Any], Rule]] = [
    ([*named("dim", "ndimension"), *_getters("ndim")], lambda func, x: len(x.shape)),
    (named("numel", "nelement"), lambda func, x: x.shape.numel()),
    (_getters("shape"), lambda func, x: x.shape),
    (_getters("nbytes"), lambda func, x: x.shape.numel() * x.element_size()),
    ([torch.Tensor.size], lambda func, x, dim=None: x.shape if dim is None else x.shape[dim]),
    ([torch.Tensor.stride], _stride),
    ([torch.Tensor.__len__], lambda func, x: x.shape[0]),
    ([torch.Tensor.__hash__], lambda func, x: id(x)),
    # What it is, without a word with the other ranks: values are printed of ``distpatch.gather(x)``.
    ([torch.Tensor.__repr__, torch.Tensor.__format__], lambda func, x, spec="", **_: format(repr(x), spec)),
    (
        named("result_type", "promote_types", "can_cast"),
        lambda func, *args: func(*(x.local if isinstance(x, PatchTensor) else x for x in args)),
    ),
    # Autograd's record, and where the rows are, are the local tensor's.
    (
        [
            *_getters("requires_grad", "is_leaf", "retains_grad", "output_nr", "_version", "grad_dtype"),
            *_getters("_backward_hooks", "_post_accumulate_grad_hooks", "_grad_fn", "volatile"),
            *named("is_inference", "is_pinned", "is_shared", "is_distributed", "dim_order", "record_stream"),
            *named("is_coalesced", "sparse_dim", "dense_dim", "qscheme"),
        ],
        lambda func, x, *args, **kwargs: func(x.local, *args, **kwargs),
    ),
    (
        [torch.Tensor.requires_grad_, torch.Tensor.retain_grad, torch.Tensor.requires_grad.__set__],  # type: ignore[attr-defined]
        _on_local,
    ),
]
for _funcs, _answer in _ANSWERS:
    rule(*_funcs, any_order=True)(_answer)


@rule(*_getters("data"), any_order=True, view=True)
@rule(*_getters("grad", "_grad"), any_order=True)
def grad(func: Any, x: PatchTensor) -> PatchTensor | None:
    value = func(x.local)
    return None if value is None else wrap(value, x)


@rule(torch.Tensor.data.__set__, torch.Tensor.grad.__set__, any_order=True)  # type: ignore[attr-defined,union-attr]
def set_part(func: Any, x: PatchTensor, value: Tensor | None) -> None:
    if value is not None and (value.shape, value.dtype) != (x.shape, x.dtype):
        raise UnsupportedOpError(
            f"a tensor of shape {tuple(value.shape)} and {value.dtype} cannot become the data or gradient of "
            f"{x!r}: a sharded tensor keeps its shape and dtype"
        )
    func(x.local, None if value is None else local_rows_of(value.detach(), x, x.row_layout.dim - x.ndim, func))


@rule(*named("cpu", "cuda", "xpu", "mtia", "ipu", "type", "to_dense", "pin_memory"), any_order=True)
def move(func: Any, x: PatchTensor, *args: Any, **kwargs: Any) -> Any:
    result = func(x.local, *args, **kwargs)
    if result is x.local:
        return x
    return wrap(result, x) if isinstance(result, Tensor) else result


@rule(torch.Tensor.__deepcopy__)
def deep_copy(func: Any, x: PatchTensor, memo: dict[int, Any]) -> PatchTensor:
    if id(x) not in memo:
        memo[id(x)] = wrap(copy.deepcopy(x.local, memo), x)
    return memo[id(x)]


@rule(*named("to", "type_as"), any_order=True)
def convert(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Only the dtype and device of another tensor matter, never its rows."""
    args = tuple(_kind(a) if isinstance(a, PatchTensor) else a for a in args)
    kwargs = {k: _kind(a) if isinstance(a, PatchTensor) else a for k, a in kwargs.items()}
    if not isinstance(x, PatchTensor):
        return func(x, *args, **kwargs)
    cast_alone = kwargs.get("memory_format", torch.preserve_format) is torch.preserve_format
    return run_rows(
        op_name(func), [x], lambda parts, *_: func(parts[0], *args, **kwargs), may_defer=cast_alone, fused=True
    )


def _kind(x: PatchTensor) -> Tensor:
    """A tensor of its dtype and device."""
    return x.recipe.sample() if x.is_deferred else x.local


@rule(torch.Tensor.is_contiguous, any_order=True)
def is_contiguous(func: Any, x: PatchTensor, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
    """The rows of a contiguous tensor are a slice of it, which has gaps, or were made for themselves."""
    if not memory_of(x).is_contiguous(memory_format=memory_format):
        return False
    if x.local.is_contiguous(memory_format=memory_format):
        return True
    strides = torch.empty(x.shape, device="meta").to(memory_format=memory_format).stride()
    return all(n == 1 or own == step for n, own, step in zip(x.shape, x.local.stride(), strides))


@rule(*named("contiguous"), any_order=True)
def contiguous(func: Any, input: PatchTensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The tensor itself where it is so on one device, else a copy."""
    if input.is_deferred and input.recipe.format is memory_format:
        return input
    local = func(input.local, memory_format=memory_format)
    if local is input.local and strides_unambiguous(input):
        return input
    if not input.is_contiguous(memory_format=memory_format):
        return wrap(input.local.clone(memory_format=memory_format), input)
    if local is input.local:
        return input
    result = wrap(local, input)
    return copied(result, input, func, lambda: input.copy_(result))


@rule(
    *named("item", "__bool__", "__float__", "__int__", "__index__", "__complex__", "__nonzero__", "is_nonzero"),
    torch.Tensor.__long__,
)
def number(func: Any, x: PatchTensor, *args: Any) -> Any:
    """The value of a tensor of one element, the same on every rank, which all ask for it."""
    if x.numel() != 1:
        raise RuntimeError(
            f"{op_name(func)}: a tensor of {x.numel()} elements is no single number, or true or false: its "
            "value is ambiguous"
        )
    return func(gather_replicated(x), *args)


COMPILED = (
    "Compile an entry point of the converted model (torch.compile(model)): plain tensors in and out. Without "
    "gradients (torch.no_grad) sharded tensors may go in and out."
)
_HAVE_NO_ADDRESS = named(
    "data_ptr", "storage", "untyped_storage", "storage_offset", "numpy", "__array__", "set_",
    "share_memory_", "__dlpack__", "__dlpack_device__", "storage_type", "__array_wrap__", "resize_",
    "resize_as_", "is_set_to", "as_strided", "as_strided_", "apply_", "map_", "map2_", "tolist",
    "module_load", "to_sparse", "to_mkldnn", "sparse_resize_", "sparse_resize_and_clear_", "resize",
    "resize_as", "const_data_ptr", "as_strided_scatter", "__reduce_ex__", "__setstate__",
    "_typed_storage", "as_strided_copy", "as_subclass",
)  # fmt: skip


@rule(*_HAVE_NO_ADDRESS, any_order=True)
def refused(func: Any, *args: Any, **kwargs: Any) -> Any:
    if is_compiling():  # torch.compile makes a fake tensor of it
        x = args[0]
        if isinstance(x, PatchTensor) and type(x.local) is Tensor and x.requires_grad:  # an input of the graph
            raise UnsupportedOpError(f"torch.compile: {x!r} carries gradients into a compiled region. {COMPILED}")
        return from_wrapper(func, *args, **kwargs)
    x = next(t for t in tensors_in((args, kwargs)) if isinstance(t, PatchTensor))
    raise UnsupportedOpError(
        f"{op_name(func)} needs one tensor in memory, but {x!r} holds only this rank's rows. "
        "Use distpatch.gather(x) for the whole tensor (on every rank: all of them gather), or x.local for "
        "this rank's rows."
    )


@rule(*_getters("__cuda_array_interface__", "_cdata"))
def no_such_attribute(func: Any, x: PatchTensor) -> Any:
    raise AttributeError(f"{x!r} has no memory of its own; use distpatch.gather(x), or x.local")
