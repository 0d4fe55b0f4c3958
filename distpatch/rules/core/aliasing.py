"""Writing: which arguments a call writes to, and what becomes of writes to a copy that torch calls a view.

On one device ``x[:, :, 0]`` is a view of ``x``; of a sharded ``x`` it is a replicated copy, and some reshapes
move rows. Such copies know their origin (``RowCopy``, ``PatchCopy``): what is written to them is written to
the origin too, or refused; and they are not read after the origin has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from distpatch.errors import UnsupportedOpError
from distpatch.lazy import buffer_reuse
from distpatch.lazy.deferred_ops import detached_recipe
from distpatch.rules.core.wrapping import dense_strides_of
from distpatch.tensor.patch_tensor import PatchCopy, PatchTensor
from distpatch.tensor.row_copy import RowCopy, RowCopyInGraph
from distpatch.tensor.rule_table import RULES, RuleEntry
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.private import DisableTorchFunctionSubclass, FakeTensor, OpOverloadPacket
from distpatch.torch_utils.tree import map_tensors, tensors_in

_IN_PLACE_OPERATORS = {
    f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul div".split()
} | {"__setitem__", "__set__", "__delitem__", "__setstate__"}
_OF_NO_VALUES = frozenset(
    getattr(torch.Tensor, name)
    for name in "size stride dim numel __len__ __hash__ storage_offset is_contiguous is_complex".split()
)
_NOTHING = RuleEntry()


def mutates(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call writes to (``add_``, ``+=``, ``inplace=True``, ``out=``, an operator's schema), or None."""
    if kwargs.get("out") is not None:
        return kwargs["out"]
    if not (may_write(func) or kwargs.get("inplace")):
        return None
    if _known(func).keeps_statistics:
        return [*args[1:], *(value for key, value in kwargs.items() if key != "input")]
    schema = _schema(func)
    if schema is not None:
        given = {**{a.name: value for a, value in zip(schema.arguments, args)}, **kwargs}
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return [given[name] for name in written if name in given] or None
    return args[0] if args else kwargs.get("input", kwargs.get("self", list(kwargs.values())))


@lru_cache(maxsize=1024)
def may_write(func: Any) -> bool:
    """Whether it writes to an argument without being told to (by ``out=`` or ``inplace=``); most functions do not."""
    schema, name = _schema(func), getattr(func, "__name__", "")
    if _known(func).keeps_statistics:
        return True
    if schema is not None:
        return bool(schema.is_mutable)
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS


def _schema(func: Any) -> Any:
    """The schema of an operator of ``torch.ops``; of several overloads, one that writes."""
    if isinstance(func, OpOverloadPacket):
        schemas = [getattr(func, name)._schema for name in func.overloads()]
        return next((schema for schema in schemas if schema.is_mutable), schemas[0])
    return getattr(func, "_schema", None)


def _known(func: Any) -> RuleEntry:
    return RULES.get(func) or _NOTHING


def written_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[PatchTensor]:
    """The sharded tensors that a call writes to."""
    return [t for t in tensors_in(mutates(func, args, kwargs)) if isinstance(t, PatchTensor)]


def before_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Materialise deferred tensors that read rows which the call will write to."""
    for x in written_tensors(func, args, kwargs):
        if x.is_deferred:
            x.recipe = detached_recipe(x.recipe)
            x.recipe.belong_to(x)
        else:
            buffer_reuse.materialize_readers(x.local)


@dataclass(eq=False)
class Origin:
    """What a copy is a copy of. ``write`` puts the copied values back, where that is possible.

    ``shape``: the source's; ``source``: None where nothing more is known of it.
    """

    source: PatchTensor | None
    shape: torch.Size
    op: str
    write: Callable[[], object] | None
    version: int | None

    def check(self, func: Any, writing: bool) -> None:
        if self.version is not None and self.version != _version(self.source):
            raise UnsupportedOpError(
                f"{op_name(func)} reads the result of {self.op}, a view of a tensor of shape "
                f"{tuple(self.shape)} that was written to since. Its rows were copied from another "
                "rank and are out of date: take the view again."
            )
        if writing and self.write is None:
            raise UnsupportedOpError(
                f"{op_name(func)} writes to the result of {self.op}, a view of a tensor of shape "
                f"{tuple(self.shape)} whose rows had to be copied from other ranks: the change would "
                "be lost. Write to the tensor itself (x[...] = value), or clone() the view first."
            )

    def write_back(self) -> None:
        assert self.write is not None
        self.write()
        self.version = _version(self.source)

    def outside(self) -> Origin:
        """Of a copy that leaves the graph in which its source is: what is written to it is refused."""
        return Origin(None, self.shape, self.op, None, None)

    def then(self, outer: Origin) -> None:
        """What is written back to the source, itself a copy, goes on to where that came from."""
        inner = self.write

        def write() -> None:
            assert inner is not None
            inner()
            outer.write_back()

        self.write = None if inner is None or outer.write is None else write


def strides_unambiguous(x: PatchTensor) -> bool:
    """Whether the strides of the local rows alone tell what is a view of them on one device."""
    return not x.row_stride and x.local.shape[x.row_layout.dim] > 1


def memory_of(x: PatchTensor) -> Tensor:
    """A tensor without data of the strides that ``x`` has on one device."""
    return torch.empty_strided(x.shape, strides_of(x), dtype=x.dtype, device="meta")


def strides_of(x: PatchTensor) -> list[int]:
    """The strides that it has on one device; a slice has gaps between its rows."""
    if x.strides is not None:
        return list(x.strides)
    strides, row = list(dense_strides_of(x)), x.row_layout.dim
    if x.row_stride:
        size, step = max(x.row_layout.size, 1), strides[row]
        outer = [d for d in range(x.ndim) if d != row and strides[d] >= step * size]
        for d in outer:
            strides[d] = strides[d] // size * (size * x.row_stride + 1)
        strides[row] *= x.row_stride
    for d in range(x.ndim):
        if d != row and x.shape[d] > 1 and not x.is_deferred and x.local.stride(d) == 0 and x.local.numel():  # expanded
            strides = [step // x.shape[d] if step > strides[d] else step for step in strides]
            strides[d] = 0
    return strides


def _version(source: PatchTensor | None) -> int | None:
    """How often the rows were written to, the same on all ranks; inference tensors do not count it."""
    return None if source is None or source.local.is_inference() else source.local._version


def copied(value: Tensor, source: PatchTensor, func: Any, write: Callable[[], object] | None = None) -> Tensor:
    """``value``, marked as a copy of what is a view of ``source`` on one device."""
    compiling = torch.compiler.is_compiling()
    if isinstance(value, (PatchCopy, RowCopy)) or (isinstance(value, FakeTensor) and not compiling):
        return value
    return _mark(value, _origin(source, func, write))


def _origin(source: PatchTensor, func: Any, write: Callable[[], object] | None = None) -> Origin:
    return Origin(source, source.shape, op_name(func), write, _version(source))


def _mark(value: Tensor, origin: Origin) -> Tensor:
    if isinstance(value, PatchTensor):
        copy: Any = PatchCopy(value.local, value.row_layout, value.region)
        copy.strides = value.strides
    elif torch.compiler.is_compiling():
        copy = RowCopyInGraph(value, origin)
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
            tensor.origin.then(_origin(source, func))
        return copied(tensor, source, func)

    return map_tensors(again, result)


def _is_aliasing(func: Any) -> bool:
    """Whether what it returns is, or may be, a view of its argument."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return _known(func).view
    return any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)


def is_basic(item: Any) -> bool:
    """Whether indexing with it makes a view."""
    return item is None or item is Ellipsis or isinstance(item, slice) or type(item) is int


def through(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call on copies: as on the tensors that they are; what it writes to them goes to their origins too."""
    copies = [t for t in tensors_in((args, kwargs)) if isinstance(t, (PatchCopy, RowCopy))]
    if not copies:  # torch asked the rows of a sharded argument, which it goes through
        return PatchTensor.__torch_function__(func, (), args, kwargs)
    moves_dims = _known(func).moves_dims
    written = set() if moves_dims else {id(t) for t in tensors_in(mutates(func, args, kwargs))}
    if _asks_of_values(func):
        for copy in copies:
            copy.origin.check(func, writing=id(copy) in written)
    result = func(*map_tensors(_plain, args), **map_tensors(_plain, kwargs))
    if moves_dims:
        return _follow(copies[0], func, args, kwargs)
    for copy in copies:
        if id(copy) in written:
            copy.origin.write_back()
            _are_up_to_date(copy.plain)
    known = {id(copy.plain): copy for copy in copies}

    def again(tensor: Tensor) -> Tensor:
        if id(tensor) in known:
            return known[id(tensor)]
        if isinstance(tensor, (PatchCopy, RowCopy)):  # a copy of a copy
            tensor.origin.then(copies[0].origin)
            return tensor
        return _mark(tensor, copies[0].origin) if _is_aliasing(func) else tensor

    return map_tensors(again, result) if isinstance(result, (Tensor, tuple, list)) else result


def _asks_of_values(func: Any) -> bool:
    """Not of a shape, a dtype and the like, which are right whatever the values are."""
    return func not in _OF_NO_VALUES and (getattr(func, "__name__", "") != "__get__" or _known(func).view)


def _are_up_to_date(rows: Any) -> None:
    """What was written back came from these: also copies that they are along inner axes hold what their origins do."""
    while isinstance(rows, PatchTensor):
        rows = rows.local
        if isinstance(rows, (PatchCopy, RowCopy)):
            rows.origin.version = _version(rows.origin.source)


def _follow(copy: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A copy whose plain tensor got other dims in place gets them too; the way back to its origin is lost."""
    if isinstance(copy, PatchCopy):
        plain = copy.plain
        copy.local, copy.row_layout, copy._shape, copy.row_stride, copy.strides = (
            plain.local,
            plain.row_layout,
            plain._shape,
            plain.row_stride,
            plain.strides,
        )
    else:
        with DisableTorchFunctionSubclass():
            func(*args, **kwargs)
    copy.origin = replace(copy.origin, write=None)
    return cast(Tensor, copy)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.plain if isinstance(tensor, (PatchCopy, RowCopy)) else tensor
