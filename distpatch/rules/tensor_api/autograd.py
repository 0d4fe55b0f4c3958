"""Gradients of sharded tensors: asked for, seen by hooks, and of ``autograd.Function`` s of one's own.

Autograd knows the local tensors. ``Function.apply`` cannot be overridden for a kind of tensor, and would cut
the graph: it is replaced (torch_utils/patches.py) by one that, where an argument is sharded, runs the Function's
``forward`` and ``backward`` on sharded tensors and puts a node in the local tensors' graph.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from distpatch.comm.collectives import narrow_rows
from distpatch.errors import UnsupportedOpError
from distpatch.layout.rows import RowLayout
from distpatch.rules.core.operands import local_rows_of
from distpatch.rules.core.redistribution import redistribute
from distpatch.rules.core.registry import rule
from distpatch.rules.core.wrapping import wrap
from distpatch.rules.tensor_api.metadata import COMPILED
from distpatch.tensor.axes import InnerTensor, bare
from distpatch.tensor.patch_tensor import PatchCopy, PatchTensor, gather_replicated
from distpatch.tensor.region import Region
from distpatch.tensor.row_copy import RowCopy
from distpatch.tensor.rule_table import RULES
from distpatch.torch_utils import patches
from distpatch.torch_utils.private import KEEPS_INPUTS, BackwardHookFunction, has_setup_context
from distpatch.torch_utils.tree import tensors_in

Kind = tuple[RowLayout, Region] | None  # of a tensor: sharded so, or replicated


def _local(tensor: Any) -> Any:
    return tensor.local if isinstance(tensor, PatchTensor) else tensor


def _bare(tensor: Any) -> Any:
    return bare(tensor.plain if isinstance(tensor, (PatchCopy, RowCopy)) else tensor)


def _cotangent(grad: Tensor | None, of: Any) -> Tensor | None:
    """The gradient that belongs to an output: its rows of it where that is sharded."""
    if not isinstance(of, PatchTensor):
        return None if grad is None else gather_replicated(grad)
    if grad is not None and grad.shape != of.shape:
        raise RuntimeError(f"a gradient of shape {tuple(grad.shape)} does not fit {tuple(of.shape)}")
    if grad is None and of.numel() != 1:
        raise RuntimeError("grad can be implicitly created only for scalar outputs")
    grad = torch.ones_like(of) if grad is None else grad
    return local_rows_of(grad, of, of.row_layout.dim - of.ndim, torch.autograd.grad)


def _cotangents(grads: Any, outputs: Sequence[Any]) -> list[Tensor | None]:
    if grads is None or isinstance(grads, Tensor):
        grads = [grads] * len(outputs) if grads is None else [grads]
    return [_cotangent(grad, of) for grad, of in zip(grads, outputs, strict=True)]


@rule(torch.Tensor.backward, any_order=True)
def backward(func: Any, x: Any, gradient: Any = None, *args: Any, **kwargs: Any) -> None:
    """``retain_graph``, ``create_graph``, ``inputs``."""
    kwargs.update(zip(("retain_graph", "create_graph", "inputs"), args))
    backward_of(torch.autograd.backward, x, gradient, **kwargs)


@rule(torch.autograd.backward)
def backward_of(
    func: Any,
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    outputs = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    func(
        [_local(t) for t in outputs],
        _cotangents(grad_tensors, outputs),
        retain_graph,
        create_graph,
        inputs=None if inputs is None else [_local(t) for t in inputs],
    )


@rule(torch.autograd.grad)
def grad(
    func: Any, outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any
) -> tuple[Tensor | None, ...]:
    if kwargs.pop("is_grads_batched", False):
        raise UnsupportedOpError("autograd.grad(is_grads_batched=True) of a sharded tensor: call it once a batch")
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    grads = func(
        [_local(t) for t in outputs], [_local(t) for t in inputs], _cotangents(grad_outputs, outputs), *args, **kwargs
    )
    return tuple(_like(g, x) for g, x in zip(grads, inputs, strict=True))


def _like(grad: Any, x: Any) -> Any:
    """A gradient of local rows as the gradient of the sharded tensor."""
    return wrap(grad, x) if isinstance(grad, Tensor) and isinstance(x, PatchTensor) else grad


@rule(torch.Tensor.register_hook, any_order=True)
def register_hook(func: Any, x: PatchTensor, hook: Callable[[Tensor], Any]) -> Any:
    """The hook sees, and may return, the gradient of the whole tensor, sharded."""

    kind = _kind(x)  # not x: what computes its gradient keeps the hook, and would keep x, which keeps that

    def on_rows(grad: Tensor) -> Tensor | None:
        whole = _sharded(grad, kind)
        result = hook(whole)
        return None if result is None else _cotangent(result, whole)

    return func(x.local, on_rows)


@rule(torch.Tensor.register_post_accumulate_grad_hook)
def register_post_accumulate_grad_hook(func: Any, x: PatchTensor, hook: Callable[[Tensor], None]) -> Any:
    return func(x.local, lambda _: hook(x))


class _Context:
    """What a Function's ``forward`` and ``backward`` know as ``ctx``: sharded tensors in, sharded tensors out.

    ``node`` is the real one, and known during a call only: the node keeps this object, and must not keep
    itself.
    """

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.node: Any = None
        self._saved: list[Kind] = []

    def save_for_backward(self, *tensors: Any) -> None:
        self._saved = [_kind(t) for t in tensors]
        self.node.save_for_backward(*map(_local, tensors))

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        return tuple(map(_sharded, self.node.saved_tensors, self._saved))

    def mark_non_differentiable(self, *tensors: Any) -> None:
        self.node.mark_non_differentiable(*map(_local, tensors))

    def mark_dirty(self, *tensors: Any) -> None:
        self.node.mark_dirty(*map(_local, tensors))

    def set_materialize_grads(self, value: bool) -> None:
        self.node.set_materialize_grads(value)

    def call(self, node: Any, function: Callable[..., Any], *args: Any) -> Any:
        self.node = node
        try:
            return function(self, *args)
        finally:
            self.node = None


@dataclass(eq=False)
class _Call:
    """What goes into a Function and comes out of it, by position; ``single``: no tuple comes out."""

    given: list[Kind]
    made: list[Kind] = field(default_factory=list)
    single: bool = False


def _kind(tensor: Any) -> Kind:
    return (tensor.row_layout, tensor.region) if isinstance(tensor, PatchTensor) else None


def _sharded(tensor: Any, kind: Kind) -> Any:
    return tensor if kind is None or tensor is None else PatchTensor(tensor, *kind)


def _grad_of(grad: Any, kind: Kind) -> Any:
    """What ``backward`` returned for an argument: this rank's rows where that is sharded, else the whole."""
    if not isinstance(grad, Tensor) or kind is None:
        return gather_replicated(grad) if isinstance(grad, Tensor) else grad
    rows, region = kind
    if isinstance(grad, PatchTensor):
        return redistribute(grad, rows, torch.autograd.Function).local
    return narrow_rows(grad, rows, region.comm.rank)


@functools.lru_cache(maxsize=256)
def _on_rows(cls: Any) -> Any:
    """The Function of local tensors that runs ``cls`` on sharded ones. It has the same name in the graph."""

    def run(ctx: _Context, *args: Any) -> Any:
        if not has_setup_context(cls.setup_context):
            return cls.forward(ctx, *args)
        result = cls.forward(*args)
        cls.setup_context(ctx, args, result)
        return result

    def forward(node: Any, call: _Call, *args: Any) -> tuple[Any, ...]:
        node.inner, node.passed = _Context(node.needs_input_grad[1:]), call
        result = node.inner.call(node, run, *map(_sharded, args, call.given))
        call.single = not isinstance(result, tuple)
        results = (result,) if call.single else result
        call.made = [_kind(t) for t in results]
        return tuple(map(_local, results))

    def backward(node: Any, *grads: Any) -> tuple[Any, ...]:
        result = node.inner.call(node, cls.backward, *map(_sharded, grads, node.passed.made))
        results = result if isinstance(result, tuple) else (result,)
        return None, *map(_grad_of, results, node.passed.given)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward), "has_hooks": _has_hooks(cls)}
    return type(cls.__name__, (torch.autograd.Function,), methods)


class _HookNode:
    """A node to which a module's full backward hooks are tied: they see gradients of the whole tensors."""

    def __init__(self, node: Any, given: list[Kind], made: list[Kind]) -> None:
        self._node, self._given, self._made = node, given, made

    def name(self) -> str:
        return self._node.name()

    def register_hook(self, hook: Callable[[Any, Any], Any]) -> Any:
        def on_rows(grads_in: tuple[Any, ...], grads_out: tuple[Any, ...]) -> Any:
            result = hook(tuple(map(_sharded, grads_in, self._given)), tuple(map(_sharded, grads_out, self._made)))
            return None if result is None else tuple(map(_grad_of, result, self._given))

        return self._node.register_hook(on_rows)


def _plain_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return _PATCH.original.__get__(None, cls)(*args, **kwargs)  # a classmethod; since torch 2.14 one of C


def _when_plain(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """A Function that is in the table, of plain tensors."""
    entry = RULES[cls]
    result = entry.rule(cls, *args, **kwargs) if entry.asks_when_plain else NotImplemented
    return _plain_apply(cls, *args, **kwargs) if result is NotImplemented else result


_own_apply: Any = inspect.getattr_static(torch.autograd.Function, "apply")


@functools.wraps(getattr(_own_apply, "__func__", _own_apply))
def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if not any(isinstance(arg, (PatchTensor, RowCopy, InnerTensor)) for arg in (*args, *kwargs.values())):
        return _plain_apply(cls, *args, **kwargs) if cls not in RULES else _when_plain(cls, *args, **kwargs)
    args, kwargs = tuple(map(_bare, args)), {key: _bare(value) for key, value in kwargs.items()}
    if not any(isinstance(arg, PatchTensor) for arg in (*args, *kwargs.values())):
        return _plain_apply(cls, *args, **kwargs)
    if cls is KEEPS_INPUTS:  # and reads them from the node: as they are, sharded
        return _plain_apply(cls, *args, **kwargs)
    if RULES.has_rule(cls):
        return handle_torch_function(cls, tuple(tensors_in((args, kwargs))), *args, **kwargs)
    if has_setup_context(cls.setup_context):
        bound = inspect.signature(cls.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        args = bound.args
    if cls.__module__.startswith("torch._functorch._aot_autograd."):  # what AOTAutograd made of a compiled region
        raise UnsupportedOpError(f"gradients of a compiled region that was given sharded tensors. {COMPILED}")
    call = _Call([_kind(arg) for arg in args])
    results = _on_rows(cls).apply(call, *map(_local, args))
    sharded = tuple(map(_sharded, results, call.made))
    if _has_hooks(cls):
        _tie_hooks(sharded, [_kind(arg) for arg in args if isinstance(arg, Tensor)], call.made)
    return sharded[0] if call.single else sharded


def _has_hooks(cls: Any) -> bool:
    """Whether it is what a module's full backward hooks are tied to, or that on the rows of an outer axis."""
    return cls is BackwardHookFunction or getattr(cls, "has_hooks", False)


def _tie_hooks(results: tuple[Any, ...], given: list[Kind], made: list[Kind]) -> None:
    """torch asks the first result that has a gradient for the node of the hooks."""
    first = next((t for t in results if t.requires_grad), None)
    if first is not None and not isinstance(first, PatchTensor):
        raise UnsupportedOpError(
            "full backward hooks of a module whose first argument (or result) with a gradient is not the "
            "sharded one: use hooks of tensors (x.register_hook)"
        )
    for tensor in results:
        if isinstance(tensor, PatchTensor) and tensor.local.grad_fn is not None:
            tensor.node = _HookNode(tensor.local.grad_fn, given, made)  # type: ignore[attr-defined]


@rule(torch.Tensor.grad_fn.__get__, any_order=True)  # type: ignore[attr-defined,union-attr]
def grad_fn(func: Any, x: PatchTensor) -> Any:
    return getattr(x, "node", None) or func(x.local)


_PATCH = patches.register(torch.autograd.Function, "apply", classmethod(_apply))
