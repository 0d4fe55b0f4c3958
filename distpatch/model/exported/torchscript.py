"""TorchScript: a scripted or traced function is run node by node, so that what it calls is asked for rules.

torch runs it by an interpreter of its own, below the table of rules, where an error even loses its text. Here the
graph of a function that meets a sharded tensor is turned into steps once; operators are called as those of
``torch.ops`` are. A graph with a node that is not known here is gathered as a whole, or refused by its name.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function

from distpatch.errors import UnsupportedOpError
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.tensor.row_copy import RowCopy
from distpatch.tensor.rule_table import RULES
from distpatch.torch_utils import patches
from distpatch.torch_utils.private import ScriptMethod, parse_schema
from distpatch.torch_utils.tree import tensors_in

Values = dict[str, Any]  # of a graph, by name
Step = Callable[[Values], None]
_DTYPES = dict(
    enumerate(
        getattr(torch, name)
        for name in "uint8 int8 int16 int32 int64 half float double complex32 complex64 complex128 bool".split()
    )
) | {15: torch.bfloat16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
_MEANINGS: dict[str, Callable[[int], Any]] = {  # of numbers in a graph, by the type that the operator declares
    "ScalarType": lambda code: _DTYPES[code],
    "MemoryFormat": lambda code: _FORMATS[code],
    "Layout": lambda code: (torch.strided, torch.sparse_coo)[code],
}


class Unknown(Exception):
    """A node that only torch's own interpreter can run."""


def _raised(message: str, *_kind: Any) -> None:
    raise torch.jit.Error(message)


def _set(container: Any, key: Any, value: Any) -> Any:
    container[key] = value
    return container


def _then(change: Callable[..., Any]) -> Callable[..., Any]:
    """A change to a list or dict, which is also its result."""

    def changed(container: Any, *args: Any) -> Any:
        change(container, *args)
        return container

    return changed


def _pairs(*items: Any) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2]))


def _same(value: Any) -> Any:
    return value


_NODES: dict[str, Callable[..., Any]] = {
    "prim::ListConstruct": lambda *items: list(items),
    "prim::TupleConstruct": lambda *items: items,
    "prim::DictConstruct": _pairs,
    "prim::TupleIndex": operator.getitem,
    "prim::unchecked_cast": _same,
    "prim::unchecked_unwrap_optional": _same,
    "aten::_unwrap_optional": _same,
    "prim::Uninitialized": lambda: None,
    "prim::RaiseException": _raised,
    "prim::Print": print,
    "prim::dtype": lambda x: _CODES[x.dtype],
    "prim::layout": lambda x: 0,
    **{f"prim::{name}": operator.attrgetter(name) for name in "device requires_grad is_cuda shape ndim data".split()},
    "aten::__is__": operator.is_,
    "aten::__isnot__": operator.is_not,
    "aten::__not__": operator.not_,
    "aten::format": str.format,
}
_CONTAINERS: dict[str, Callable[..., Any]] = {
    "aten::append": _then(list.append),
    "aten::extend": list.extend,
    "aten::insert": list.insert,
    "aten::pop": lambda container, *key: container.pop(*key),
    "aten::clear": lambda container: container.clear(),
    "aten::reverse": list.reverse,
    "aten::update": dict.update,
    "aten::copy": lambda container: container.copy(),
    "aten::list": list,
    "aten::keys": lambda held: list(held.keys()),
    "aten::values": lambda held: list(held.values()),
    "aten::items": lambda held: list(held.items()),
    "aten::get": dict.get,
    "aten::len": len,
    "aten::add": operator.add,
    "aten::add_": operator.iadd,
    "aten::mul": operator.mul,
    "aten::__getitem__": operator.getitem,
    "aten::_set_item": _set,
    "aten::Delete": operator.delitem,
    "aten::__contains__": operator.contains,
    "aten::slice": lambda held, start=None, end=None, step=1: held[slice(start, end, step)],
}


def scripted(func: Any) -> Callable[..., Any] | None:
    """What stands for a scripted or traced function, or method: None where torch alone can run it."""
    known: dict[str, Any] = func.__dict__
    if "_distpatch" not in known:
        try:
            known["_distpatch"] = _function(func)
        except Unknown:
            known["_distpatch"] = None
    return known["_distpatch"]


def _function(func: Any) -> Callable[..., Any]:
    graph = func.inlined_graph
    run, results = _block(graph)
    names = [value.debugName() for value in graph.inputs()]
    owner = [func.owner] if isinstance(func, ScriptMethod) else []
    arguments = func.schema.arguments[len(owner) :]

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(arguments) or not kwargs.keys() <= {a.name for a in arguments[len(args) :]}:
            raise RuntimeError(f"{func.name} does not take {len(args)} arguments and {sorted(kwargs)}: {func.schema}")
        given = [*owner, *args]
        for argument in arguments[len(args) :]:
            if argument.name not in kwargs and not argument.has_default_value():
                raise RuntimeError(f"{func.name}() is missing value for argument {argument.name!r}: {func.schema}")
            given.append(kwargs.get(argument.name, argument.default_value))
        values = dict(zip(names, given))
        run(values)
        returned = [values[name] for name in results]
        return returned[0] if len(returned) == 1 else tuple(returned)

    return call


def _block(block: Any) -> tuple[Step, list[str]]:
    """The steps of a block one after the other, and the names of its results."""
    results = [value.debugName() for value in (block.outputs())]
    steps = [_step(node) for node in block.nodes()]

    def run(values: Values) -> None:
        for step in steps:
            step(values)

    return run, results


def _step(node: Any) -> Step:
    kind, ins = node.kind(), [value.debugName() for value in node.inputs()]
    outs = [value.debugName() for value in node.outputs()]
    if kind == "prim::Constant":
        return _giving(outs, functools.partial(_same, node.output().toIValue()), [])
    if kind == "prim::If":
        return _choice(outs, ins, [_block(block) for block in node.blocks()])
    if kind == "prim::Loop":
        return _loop(outs, ins, next(node.blocks()))
    if kind == "prim::GetAttr":
        return _giving(outs, functools.partial(_attribute, node.s("name")), ins)
    if kind == "prim::SetAttr":
        return _giving(outs, functools.partial(_set_attribute, node.s("name")), ins)
    if kind in {"prim::TupleUnpack", "prim::ListUnpack"}:
        return lambda values: values.update(zip(outs, values[ins[0]], strict=True))
    if kind == "prim::TupleConstruct" and str(node.output().type()).startswith("__torch__"):
        raise Unknown(kind)  # a named tuple, whose class is not known here
    return _giving(outs, _callable(node, kind), ins)


def _giving(outs: list[str], call: Callable[..., Any], ins: list[str]) -> Step:
    def step(values: Values) -> None:
        result = call(*[values[name] for name in ins])
        if len(outs) == 1:
            values[outs[0]] = result
        elif outs:
            values.update(zip(outs, result, strict=True))

    return step


def _choice(outs: list[str], ins: list[str], blocks: Sequence[tuple[Step, list[str]]]) -> Step:
    def step(values: Values) -> None:
        run, results = blocks[0 if values[ins[0]] else 1]
        run(values)
        values.update([(out, values[result]) for out, result in zip(outs, results, strict=True)])

    return step


def _loop(outs: list[str], ins: list[str], body: Any) -> Step:
    """``for`` and ``while``: a number of rounds, a condition, and values that are carried from round to round."""
    run, (condition, *results) = _block(body)
    number, *carried = [value.debugName() for value in body.inputs()]

    def step(values: Values) -> None:
        most, going, *state = (values[name] for name in ins)
        done = 0
        while going and done < most:
            values.update(zip(carried, state, strict=True))
            values[number] = done
            run(values)
            going, state, done = values[condition], [values[name] for name in results], done + 1
        values.update(zip(outs, state, strict=True))

    return step


def _attribute(name: str, owner: Any) -> Any:
    return owner.getattr(name) if hasattr(owner, "getattr") else getattr(owner, name)


def _set_attribute(name: str, owner: Any, value: Any) -> None:
    if any(isinstance(t, (PatchTensor, RowCopy)) for t in tensors_in(value)):
        raise UnsupportedOpError(
            f"a scripted module would keep a sharded tensor as its attribute {name!r}: return it instead, or keep "
            "distpatch.gather of it outside the scripted module"
        )
    owner.setattr(name, value)


def _callable(node: Any, kind: str) -> Callable[..., Any]:
    if kind in _NODES:
        return _NODES[kind]
    first = next(iter(node.inputs()), None)
    if first is not None and first.type().kind() in {"ListType", "DictType", "TupleType"} and kind in _CONTAINERS:
        return _CONTAINERS[kind]
    if "::" not in node.schema():
        raise Unknown(kind)
    schema = parse_schema(node.schema())
    space, _, name = schema.name.partition("::")
    packet = getattr(getattr(torch.ops, space), name, None)
    called = getattr(packet, schema.overload_name or "default", None)
    if called is None:
        raise Unknown(kind)
    return _with_meanings(called, schema.arguments)


def _with_meanings(called: Any, arguments: Sequence[Any]) -> Callable[..., Any]:
    """An operator of which a graph names dtypes and formats by number, and every argument by its place."""
    meanings: dict[int, Callable[[int], Any]] = {}
    for at, argument in enumerate(arguments):
        name = str(argument.real_type).removeprefix("Optional[").removesuffix("]")
        if name in _MEANINGS:
            meanings[at] = _MEANINGS[name]
    positional = sum(not argument.kwarg_only for argument in arguments)
    names = [argument.name for argument in arguments[positional:]]

    def call(*args: Any) -> Any:
        given = list(args)
        for at, meaning in meanings.items():
            if isinstance(given[at], int):
                given[at] = meaning(given[at])
        return called(*given[:positional], **dict(zip(names, given[positional:])))

    return call


def _replace_call(scripted_type: Any) -> None:
    """Calls of a scripted function ask their arguments for a rule, wherever in them they are."""

    @functools.wraps(scripted_type.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        sharded = [t for t in tensors_in((args, kwargs)) if isinstance(t, (PatchTensor, RowCopy))]
        if sharded:
            return handle_torch_function(self, sharded, *args, **kwargs)
        return patch.original(self, *args, **kwargs)

    patch = patches.register(scripted_type, "__call__", call)


# Torch's own calls of them ask nobody, or only arguments that are in no list.
for _type in (torch.jit.ScriptFunction, ScriptMethod):
    _replace_call(_type)
    RULES.kinds[_type] = scripted
