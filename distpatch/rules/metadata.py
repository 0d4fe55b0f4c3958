"""What a PatchTensor says of itself, and what it cannot say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpatch.collectives import memory_format
from distpatch.errors import UnsupportedOpError
from distpatch.rules.registry import named, op_name, rule, wrap
from distpatch.tensor import PatchTensor, whole


def _getter(name: str) -> Any:
    return getattr(torch.Tensor, name).__get__


_TOLD_BY_WRAPPER = """
    shape ndim dtype device layout is_cuda is_cpu is_sparse is_quantized is_meta is_mkldnn is_xpu is_mps
    is_nested itemsize nbytes names is_sparse_csr is_xla is_ipu is_vulkan is_maia
""".split()


# The wrapper itself has the global shape and the local dtype and device.
@rule(
    *named("dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "is_signed"),
    *named("get_device", "ndimension", "is_same_size", "is_conj", "is_neg"),
    *(_getter(name) for name in _TOLD_BY_WRAPPER if hasattr(torch.Tensor, name)),
)
def from_wrapper(func: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


@rule(torch.Tensor.size)
def size(func: Any, x: PatchTensor, dim: int | None = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


@rule(torch.Tensor.__len__)
def length(func: Any, x: PatchTensor) -> Any:
    return x.shape[0]


@rule(torch.Tensor.__hash__)
def identity_hash(func: Any, x: PatchTensor) -> int:
    return id(x)


# Autograd's record is the local tensor's.
@rule(
    torch.Tensor.__repr__,
    *(_getter(name) for name in ("requires_grad", "is_leaf", "grad_fn", "retains_grad", "output_nr")),
)
def from_local(func: Any, x: PatchTensor, *args: Any, **kwargs: Any) -> Any:
    if func is torch.Tensor.__repr__:
        return repr(x)
    return func(x.local, *args, **kwargs)


@rule(_getter("_version"))
def version(func: Any, x: PatchTensor) -> Any:
    return func(x.local)


@rule(_getter("grad"), _getter("data"))
def grad(func: Any, x: PatchTensor) -> PatchTensor | None:
    value = func(x.local)
    return None if value is None else wrap(value, x)


@rule(torch.Tensor.requires_grad_, torch.Tensor.retain_grad)
def on_local(func: Any, x: PatchTensor, *args: Any, **kwargs: Any) -> PatchTensor:
    func(x.local, *args, **kwargs)
    return x


@rule(torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def set_requires_grad(func: Any, x: PatchTensor, value: bool) -> None:
    x.local.requires_grad_(value)


@rule(torch.Tensor.backward)
def backward(func: Any, x: PatchTensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    if gradient is None or x.shape != gradient.shape:
        raise RuntimeError("grad can be implicitly created only for scalar outputs")
    func(x.local, _rows_of(gradient, x), *args, **kwargs)


def _rows_of(tensor: Tensor, like: PatchTensor) -> Tensor:
    if isinstance(tensor, PatchTensor) and tensor.rows == like.rows:
        return tensor.local
    lo, hi = like.rows.interval(like.region.comm.rank)
    return whole(tensor).narrow(like.rows.dim, lo, hi - lo)


@rule(
    *named("cpu", "cuda", "type", "to_dense", "pin_memory"),
)
def move(func: Any, x: PatchTensor, *args: Any, **kwargs: Any) -> Any:
    result = func(x.local, *args, **kwargs)
    return wrap(result, x) if isinstance(result, Tensor) else result


@rule(*named("to", "type_as"))
def convert(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Only the dtype and device of another tensor matter, never its rows."""
    args = tuple(a.local if isinstance(a, PatchTensor) else a for a in args)
    kwargs = {k: a.local if isinstance(a, PatchTensor) else a for k, a in kwargs.items()}
    if not isinstance(x, PatchTensor):
        return func(x, *args, **kwargs)
    result = func(x.local, *args, **kwargs)
    return x if result is x.local else wrap(result, x)


@rule(torch.Tensor.is_contiguous)
def is_contiguous(func: Any, x: PatchTensor, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
    return x.local.is_contiguous(memory_format=memory_format)


@rule(torch.Tensor.stride)
def stride(func: Any, x: PatchTensor, dim: int | None = None) -> Any:
    """Strides that the global tensor would have, dense in the memory order of the local rows."""
    order = sorted(range(x.ndim), key=lambda d: (x.local.stride(d), -d))
    if memory_format(x.local) is torch.contiguous_format and x.local.is_contiguous():
        order = list(reversed(range(x.ndim)))
    strides, step = [0] * x.ndim, 1
    for d in order:
        strides[d], step = step, step * x.shape[d]
    return tuple(strides) if dim is None else strides[dim]


@rule(*named("result_type", "promote_types", "can_cast"))
def promotion(func: Any, *args: Any) -> torch.dtype:
    result: torch.dtype = func(*(a.local if isinstance(a, PatchTensor) else a for a in args))
    return result


_HAVE_NO_ADDRESS = named(
    "data_ptr", "storage", "untyped_storage", "storage_offset", "numpy", "__array__", "set_",
    "share_memory_", "__dlpack__", "__dlpack_device__", "storage_type", "__array_wrap__", "resize_",
    "resize_as_", "is_set_to", "as_strided", "as_strided_", "register_hook", "apply_", "map_", "map2_",
    "module_load", "to_sparse", "to_mkldnn", "sparse_resize_", "sparse_resize_and_clear_",
)  # fmt: skip


@rule(*_HAVE_NO_ADDRESS)
def refused(func: Any, x: PatchTensor, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedOpError(
        f"{op_name(func)} needs one tensor in memory, but {x!r} holds only this rank's rows. "
        "Use distpatch.gather(x) for the whole tensor, or x.local for this rank's rows."
    )
