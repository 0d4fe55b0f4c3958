"""One call of a converted model: what enters it, what leaves it, and what is kept until the next."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from distpatch.comm.meshes import Ranks
from distpatch.errors import DistPatchError, LayoutError
from distpatch.lazy.buffer_reuse import deferred_rows
from distpatch.model.arguments import problem_of, signature_of
from distpatch.model.entrance import Entrance
from distpatch.rules.core.redistribution import in_order
from distpatch.tensor.options import Options
from distpatch.tensor.patch_tensor import (
    PatchTensor,
    axes_in,
    gather_replicated,
    handed_back,
    on_rank0,
    shard_input,
    whole,
)
from distpatch.tensor.region import CallState, Region
from distpatch.tensor.user_classes import kind_of
from distpatch.torch_utils.tree import give_back, map_tensors, tensors_in

T = TypeVar("T")
STATE = "_distpatch"  # of a converted model: the attribute that holds its ``Conversion``


class Told(Protocol):
    """What is chosen anew at each call, from what the ranks tell each other before it (model/policy.py).

    ``sends``: whether ranks exchange anything in the call, once it is chosen.
    """

    @property
    def sends(self) -> bool: ...

    def payload(self, replicated: list[Tensor]) -> dict[str, object]:
        """What this rank tells the others before the call; ``replicated``: of its arguments."""

    def begin(self, signature: str, answers: list[dict[str, object]]) -> None:
        """Choose what this call is; ``answers``: every rank's payload."""


class Steps(Told, Protocol):
    """What makes each call of a converted model a step (diffusion/displaced_steps.py)."""

    def problem(self, what: str) -> str | None:
        """Why this call cannot be a step, or None."""

    def step(self, run: Callable[[], T]) -> T:
        """Run the model, perhaps twice; returns what it returned."""


class Thread(threading.local):
    def __init__(self) -> None:
        self.inside = False  # the sharded computation

    @contextmanager
    def as_if(self, *, inside: bool) -> Iterator[None]:
        before, self.inside = self.inside, inside
        try:
            yield
        finally:
            self.inside = before


@dataclass
class Conversion:
    """What was done to a model, and what is needed to undo it.

    ``steps``: of what is open, if each call is a step; ``entrances``: what enters sharded, by entry point.
    """

    region: Region
    ranks: Ranks
    options: Options
    steps: Steps | None = None
    entrances: dict[str, Entrance] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    thread: Thread = field(default_factory=Thread)

    @contextmanager
    def each_call_is_a_step(self, steps: Steps) -> Iterator[None]:
        self.steps = steps
        try:
            yield
        finally:
            self.steps = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DistPatchError(
            "a converted model can be neither copied (copy.deepcopy) nor pickled: its entry points are tied to this "
            "model and its group. Copy it before it is converted, or after distpatch.restore_model; its state dict "
            "can be saved at any time."
        )


def conversion_of(model: nn.Module) -> Conversion | None:
    """What ``convert_model`` did to a model, or None where it is not converted."""
    conversion: Conversion | None = model.__dict__.get(STATE)
    return conversion


class Call:
    """The arguments of one call, on their way in and out."""

    def __init__(self, entrance: Entrance, state: Conversion, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.entrance, self.what, self.state, self.model = entrance, entrance.what, state, model
        self.arguments = args, kwargs
        self.given = list(tensors_in(self.arguments))
        self.dims = entrance.dims(args, kwargs)
        self.sharded = [t for t in self.given if self.dims.of(t) is not None]
        kinds = (t.region.kind if isinstance(t, PatchTensor) else kind_of(t) for t in self.sharded)
        self.kind = next((kind for kind in kinds if kind is not None), None)
        self.versions = [None if t.is_inference() else t._version for t in self.sharded]
        self.left: dict[int, tuple[Tensor, Any]] = {}
        self.mine: set[int] = set()  # tensors that leave as they are
        self.made: list[tuple[Any, Any]] = []

    @property
    def problem(self) -> str | None:
        return problem_of(self.entrance, self.arguments, self.given, self.state.region)

    @property
    def replicated(self) -> list[Tensor]:
        """The tensors that every rank computes with whole."""
        return [t for t in self.given if self.dims.of(t) is None]

    @property
    def signature(self) -> str:
        return signature_of(self.given)

    def enter(self, region: Region) -> Any:
        """The arguments, sharded where they are to be. Containers that hold any such are copied."""
        buffers = frozenset(id(buffer) for *_, buffer in _buffers(self.model))
        self.region = replace(_with_buffers(region, buffers), kind=self.kind)
        self.made = []
        return map_tensors(self._sharded, self.arguments, self._pulled, made=self.made)

    def _sharded(self, tensor: Tensor, source: object = None) -> Tensor:
        dim = self.dims.of(tensor, source)
        return tensor if dim is None else shard_input(tensor, dim, self.region)

    def _pulled(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """A generator that is an argument: what it yields enters as the model asks for it."""
        for number in itertools.count(1):
            with self.state.thread.as_if(inside=False):  # it may call a converted model itself
                try:
                    value = next(iterator)
                except StopIteration:
                    return
            given = list(tensors_in(value))
            if any(self.dims.of(t, iterator) is not None for t in given):
                self.state.ranks.begin_call(f"{self.what}, value {number} of an iterator", signature_of(given))
            yield map_tensors(partial(self._sharded, source=iterator), value)

    def leave(self, result: Any) -> Any:
        """What the caller gets, in the result and in the arguments' containers; buffers are plain again."""
        self.left.clear()
        self.mine = {id(t) for t in self.given}
        if self.kind is not None:
            self.mine.update(map(id, itertools.chain(self.model.parameters(), self.model.buffers())))
        result = map_tensors(self._leave, result, self._streamed)
        self._give_back()
        self.tidy()
        return result

    def tidy(self) -> None:
        """Buffers are plain after the call, and nothing is deferred beyond it."""
        for buffers, key, buffer in sharded_buffers(self.model):
            buffers[key] = self._leave(buffer) if self.state.options.output == "gather" else handed_back(buffer)
        for rows in deferred_rows():  # in a cache: what they are made of may change
            if (owner := rows.owner()) is not None:
                owner.materialize()
        self.left.clear()

    def _give_back(self) -> None:
        """What the model wrote to sharded arguments and containers of the caller's is written there."""
        entered = {id(old): new for old, new in self.made}
        for given, version in zip(self.sharded, self.versions):
            if not isinstance(given, PatchTensor) and version is not None and given._version != version:
                given.data.copy_(whole(entered[id(given)]))  # of which the model wrote to this rank's rows
        if any(not isinstance(value, Tensor) for value in (*self.arguments[0], *self.arguments[1].values())):
            give_back(self.made)
            map_tensors(self._leave, self.arguments, in_place=True)

    def _leave(self, tensor: Tensor) -> Any:
        if id(tensor) in self.mine:
            return tensor
        if id(tensor) not in self.left:
            left = leave(tensor, self.state)
            if self.kind is not None and type(left) is Tensor and not isinstance(tensor, PatchTensor):
                left = self.kind.of(left)  # a mean over rows, say
            self.left[id(tensor)] = tensor, left
        return self.left[id(tensor)][1]

    def _streamed(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """A generator that is a result: each value is made inside a call of its own, and leaves it."""
        sent, signature = None, self.signature
        try:
            for number in itertools.count(1):
                with inside(self.state, f"{self.what}, value {number}", signature):
                    try:
                        value = next(iterator) if sent is None else iterator.send(sent)  # type: ignore[attr-defined]
                    except StopIteration as end:
                        return self.leave(end.value)
                    value = self.leave(value)
                sent = yield value
        finally:
            if hasattr(iterator, "close"):
                with self.state.thread.as_if(inside=True):
                    iterator.close()


@contextmanager
def inside(
    state: Conversion,
    what: str,
    signature: str,
    problem: str | None = None,
    told: Told | None = None,
    replicated: list[Tensor] | None = None,
) -> Iterator[None]:
    """Meet the other ranks, then mark this thread as inside; an error is noted for ranks that wait for this one."""
    if state.thread.inside:
        yield
        return
    ranks = state.ranks
    ranks.wait_at_most(state.options.liveness, state.options.late_check)
    answers = ranks.begin_call(what, signature, None if told is None else told.payload(replicated or []))
    if problem:
        raise LayoutError(problem)
    with state.thread.as_if(inside=True):
        with ranks.open_call(what):
            if told is not None:
                told.begin(signature, answers)
            if told is None or told.sends:
                yield
                return
        yield  # an error of this rank is nothing to the others


def leave(tensor: Tensor, state: Conversion) -> Any:
    """A tensor of a result, as the caller wants it."""
    if not isinstance(tensor, PatchTensor):
        return gather_replicated(tensor)
    if torch.compiler.is_dynamo_compiling() and state.options.output != "shard":
        whole_output = torch.ops.distpatch.gather(tensor, "output")
        return whole_output if state.options.output == "gather" or state.region.comm.rank == 0 else None
    comm, kind = tensor.region.comm, tensor.region.kind
    if state.options.output == "gather":
        one = comm.size == 1 and tensor.region.inner is None  # then the rows are the whole tensor: no copy
        gathered = tensor.local if one else whole(tensor, "output")
        return gathered if kind is None else kind.of(gathered)
    ordered = _in_order(tensor)
    if state.options.output == "shard":
        for part in axes_in(ordered):  # and nothing is deferred beyond the call
            part.region = part.region.handed_out
        return ordered
    first = on_rank0(ordered, "output")
    return first if first is None or kind is None else kind.of(first)


def _in_order(tensor: PatchTensor) -> PatchTensor:
    """With its rows in order, along every axis."""
    ordered: PatchTensor = in_order(tensor)
    if isinstance(ordered.local, PatchTensor):
        ordered.local = _in_order(ordered.local)
    return ordered


def _with_buffers(region: Region, buffers: frozenset[int]) -> Region:
    inner = None if region.inner is None else _with_buffers(region.inner, buffers)
    return replace(region, call=CallState(region.call.replicas, buffers), inner=inner)


def sharded_buffers(model: nn.Module) -> list[tuple[dict[str, Any], str, PatchTensor]]:
    """In which dict, by which name, each registered buffer that has become sharded; in the same order on all ranks."""
    return [found for found in _buffers(model) if isinstance(found[2], PatchTensor)]


def _buffers(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Every buffer of every module. Twice a call: ``model.buffers()`` takes milliseconds of a large model."""
    modules, seen = [model], {model}
    found: list[tuple[dict[str, Any], str, Any]] = []
    for module in modules:  # to which its children are added
        if module._buffers:
            found += [(module._buffers, key, buffer) for key, buffer in module._buffers.items()]
        if module._modules:
            for child in module._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    modules.append(child)
    return found
