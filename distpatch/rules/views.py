"""Writing: which arguments a call writes to, and what becomes of writes to a copy that torch calls a view.

On one device ``x[:, :, 0]`` is a view of ``x``; of a sharded ``x`` it is a replicated copy, and some reshapes
move rows. Such copies know their origin (``RowCopy``, ``PatchCopy``): what is written to them is written to
the origin too, or refused; and they are not read after the origin has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from distpatch import holders
from distpatch.errors import UnsupportedOpError
from distpatch.lazy import alone
from distpatch.rules.registry import named, op_name
from distpatch.tensor import RULES, PatchCopy, PatchTensor, RowCopy
from distpatch.tree import map_tensors, tensors_in

ALIASING = frozenset(
    named(
        *"view view_as reshape reshape_as flatten ravel unflatten permute transpose t adjoint swapaxes".split(),
        *"swapdims movedim moveaxis unsqueeze squeeze expand expand_as broadcast_to narrow select chunk".split(),
        *"split tensor_split split_with_sizes unsafe_chunk unsafe_split hsplit vsplit dsplit unbind".split(),
        *"diagonal unfold view_as_real view_as_complex real imag detach __getitem__ as_strided _unsafe_view".split(),
        *"atleast_1d atleast_2d atleast_3d broadcast_tensors meshgrid conj resolve_conj positive".split(),
    )
).union([torch.linalg.diagonal], (getattr(torch.Tensor, name).__get__ for name in "T mT H mH real imag data".split()))

_IN_PLACE_OPERATORS = {
    f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul div".split()
} | {"__setitem__", "__set__", "__delitem__", "__setstate__"}


# Their running statistics are written to, of which neither the name nor the schema says anything.
_KEEP_STATISTICS = frozenset(
    named(
        *"native_batch_norm _native_batch_norm_legit cudnn_batch_norm".split(),
        *"miopen_batch_norm batch_norm_gather_stats batch_norm_gather_stats_with_counts".split(),
        *"batch_norm_update_stats fused_moving_avg_obs_fake_quant".split(),
    )
)


# In place they change no value, but which dim is which.
MOVES_DIMS = frozenset(named("unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_"))


def mutates(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call writes to (``add_``, ``+=``, ``inplace=True``, ``out=``, an operator's schema), or None."""
    if kwargs.get("out") is not None:
        return kwargs["out"]
    if func in _KEEP_STATISTICS:
        return [*args[1:], *(value for key, value in kwargs.items() if key != "input")]
    schema = _schema(func)
    if schema is not None:
        given = {**{a.name: value for a, value in zip(schema.arguments, args)}, **kwargs}
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return [given[name] for name in written if name in given] or None
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS
    if not (in_place or kwargs.get("inplace")):
        return None
    return args[0] if args else kwargs.get("input", kwargs.get("self", list(kwargs.values())))


def _schema(func: Any) -> Any:
    """The schema of an operator of ``torch.ops``; of several overloads, one that writes."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        schemas = [getattr(func, name)._schema for name in func.overloads()]
        return next((schema for schema in schemas if schema.is_mutable), schemas[0])
    return getattr(func, "_schema", None)


def written_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[PatchTensor]:
    """The sharded tensors that a call writes to."""
    return [t for t in tensors_in(mutates(func, args, kwargs)) if isinstance(t, PatchTensor)]


def before_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compute what waits for rows that the call will write to."""
    for x in written_tensors(func, args, kwargs):
        if x.waits:
            x.recipe = alone(x.recipe)
            holders.own(x.recipe, x)
        else:
            holders.settle(x.local)


@dataclass(eq=False)
class Origin:
    """What a copy is a copy of. ``write`` puts the copied values back, where that is possible."""

    source: PatchTensor
    op: str
    write: Callable[[], object] | None
    version: int | None

    def check(self, func: Any, writing: bool) -> None:
        if self.version is not None and self.version != _version(self.source):
            raise UnsupportedOpError(
                f"{op_name(func)} reads the result of {self.op}, a view of a tensor of shape "
                f"{tuple(self.source.shape)} that was written to since. Its rows were copied from another "
                "rank and are out of date: take the view again."
            )
        if writing and self.write is None:
            raise UnsupportedOpError(
                f"{op_name(func)} writes to the result of {self.op}, a view of a tensor of shape "
                f"{tuple(self.source.shape)} whose rows had to be copied from other ranks: the change would "
                "be lost. Write to the tensor itself (x[...] = value), or clone() the view first."
            )

    def write_back(self) -> None:
        assert self.write is not None
        self.write()
        self.version = _version(self.source)

    def then(self, outer: Origin) -> None:
        """What is written back to the source, itself a copy, goes on to where that came from."""
        inner = self.write

        def write() -> None:
            assert inner is not None
            inner()
            outer.write_back()

        self.write = None if inner is None or outer.write is None else write


def is_sure(x: PatchTensor) -> bool:
    """Whether the strides of the local rows alone tell what is a view of them on one device."""
    return not x.cut and x.local.shape[x.rows.dim] > 1


def memory_of(x: PatchTensor) -> Tensor:
    """A tensor without data of the strides that ``x`` has on one device."""
    return torch.empty_strided(x.shape, strides_of(x), dtype=x.dtype, device="meta")


def strides_of(x: PatchTensor) -> list[int]:
    """The strides that it has on one device; a slice has gaps between its rows."""
    if x.strides is not None:
        return list(x.strides)
    strides, row = list(x.stride()), x.rows.dim
    if x.cut:
        size, step = max(x.rows.size, 1), strides[row]
        outer = [d for d in range(x.ndim) if d != row and strides[d] >= step * size]
        for d in outer:
            strides[d] = strides[d] // size * (size * x.cut + 1)
        strides[row] *= x.cut
    for d in range(x.ndim):
        if d != row and x.shape[d] > 1 and not x.waits and x.local.stride(d) == 0 and x.local.numel():  # expanded
            strides = [step // x.shape[d] if step > strides[d] else step for step in strides]
            strides[d] = 0
    return strides


def _version(source: PatchTensor) -> int | None:
    """How often the rows were written to, the same on all ranks; inference tensors do not count it."""
    return None if source.local.is_inference() else source.local._version


def copied(value: Tensor, source: PatchTensor, func: Any, write: Callable[[], object] | None = None) -> Tensor:
    """``value``, marked as a copy of what is a view of ``source`` on one device."""
    if torch.compiler.is_compiling() or isinstance(value, (PatchCopy, RowCopy, FakeTensor)):
        return value
    return _mark(value, Origin(source, op_name(func), write, _version(source)))


def _mark(value: Tensor, origin: Origin) -> Tensor:
    if isinstance(value, PatchTensor):
        copy: Any = PatchCopy(value.local, value.rows, value.region)
        copy.strides = value.strides
    else:
        copy = value.as_subclass(RowCopy)  # type: ignore[arg-type]
    copy.plain, copy.origin = value, origin
    return cast(Tensor, copy)


def protect(func: Any, source: PatchTensor, result: Any, args: tuple[Any, ...]) -> Any:
    """The result of a function that ran on a copy of ``source``, so that no write to it is lost."""
    if not _is_aliasing(func):
        return result
    if op_name(func) == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else args[1:2]
        if not all(map(is_basic, index)):
            return result

    def again(tensor: Tensor) -> Tensor:
        if isinstance(tensor, (PatchCopy, RowCopy)):  # a copy of the copy
            tensor.origin.then(Origin(source, op_name(func), None, _version(source)))
        return copied(tensor, source, func)

    return map_tensors(again, result)


def _is_aliasing(func: Any) -> bool:
    """Whether what it returns is, or may be, a view of its argument."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return func in ALIASING
    return any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)


def is_basic(item: Any) -> bool:
    """Whether indexing with it makes a view."""
    return item is None or item is Ellipsis or isinstance(item, slice) or type(item) is int


def through(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call on copies: as on the tensors that they are; what it writes to them goes to their origins too."""
    if (stand_in := RULES.stand_in(func)) is not None:  # what it calls comes here by itself
        return stand_in(*args, **kwargs)
    copies = [t for t in tensors_in((args, kwargs)) if isinstance(t, (PatchCopy, RowCopy))]
    if not copies:  # torch asked the rows of a sharded argument, which it goes through
        return PatchTensor.__torch_function__(func, (), args, kwargs)
    written = set() if func in MOVES_DIMS else {id(t) for t in tensors_in(mutates(func, args, kwargs))}
    for copy in copies:
        copy.origin.check(func, writing=id(copy) in written)
    result = func(*map_tensors(_plain, args), **map_tensors(_plain, kwargs))
    if func in MOVES_DIMS:
        return _follow(copies[0], func, args, kwargs)
    for copy in copies:
        if id(copy) in written:
            copy.origin.write_back()
    known = {id(copy.plain): copy for copy in copies}

    def again(tensor: Tensor) -> Tensor:
        if id(tensor) in known:
            return known[id(tensor)]
        if isinstance(tensor, (PatchCopy, RowCopy)):  # a copy of a copy
            tensor.origin.then(copies[0].origin)
            return tensor
        return _mark(tensor, copies[0].origin) if _is_aliasing(func) else tensor

    return map_tensors(again, result) if isinstance(result, (Tensor, tuple, list)) else result


def _follow(copy: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A copy whose plain tensor got other dims in place gets them too; the way back to its origin is lost."""
    if isinstance(copy, PatchCopy):
        plain = copy.plain
        copy.local, copy.rows, copy._shape, copy.cut, copy.strides = (
            plain.local,
            plain.rows,
            plain._shape,
            plain.cut,
            plain.strides,
        )
    else:
        with torch._C.DisableTorchFunctionSubclass():
            func(*args, **kwargs)
    copy.origin = replace(copy.origin, write=None)
    return cast(Tensor, copy)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.plain if isinstance(tensor, (PatchCopy, RowCopy)) else tensor


RULES.before_writing = before_writing
RULES.through = through
