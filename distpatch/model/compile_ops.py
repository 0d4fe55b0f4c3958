"""What torch.compile sees of entering and leaving a sharded computation: four operators.

Dynamo puts operators of a sharded tensor into its graph as they are; the rules run when AOTAutograd traces that
graph, as ordinary Python on fake rows. So Dynamo needs no more than operators for what is no torch function: to
meet the other ranks, to shard, to gather, to end. What is left then are plain tensors and transfers, which are
operators too (comm/row_exchange.py, comm/collectives.py), with an effect, so that all ranks keep their order.
"""

from __future__ import annotations

import operator
import secrets
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.collectives import gather_rows
from distpatch.comm.communicator import Communicator, communicator_of
from distpatch.tensor.options import Options
from distpatch.tensor.patch_tensor import PatchTensor, shard_input
from distpatch.tensor.region import Region
from distpatch.tensor.rule_table import RULES, RuleEntry
from distpatch.torch_utils.operators import collective, library


@collective("begin_call")
def begin_call(beside: Sequence[Tensor], name: str, what: str, signature: str) -> None:
    """A barrier that checks that all ranks make the same call, at every run of a compiled graph.

    ``beside``: a tensor of the call. Around an operator without any, which is on no device, torch's compiler frees
    tensors that a kernel has yet to read (``primals_3`` is not associated with a value; seen in 2.13 on a CPU).
    """
    comm = communicator_of(name)
    comm.begin_call(what, signature)
    comm.in_call = True
    if comm.has_peers and _thread.caller is not None:
        _thread.caller.append((comm, what))
    elif comm.has_peers:
        _look_for_an_exception(comm, what)


@collective("end_call")
def end_call(beside: Sequence[Tensor], name: str) -> None:
    """All that the graph sends has been sent, and what it was sent is whole."""
    if sys.gettrace() is _look_at_no_frame:
        sys.settrace(None)
    communicator_of(name).end_call()


@torch.library.register_fake(begin_call)
def _(beside: Sequence[Tensor], name: str, what: str, signature: str) -> None:
    return None


@torch.library.register_fake(end_call)
def _(beside: Sequence[Tensor], name: str) -> None:
    return None


class _Thread(threading.local):
    caller: list[tuple[Communicator, str]] | None = None  # of compiled code, that tells of exceptions: what has begun


_thread = _Thread()


@contextmanager
def tells_of_exceptions() -> Iterator[None]:
    """An exception that leaves compiled code, which is called in here, is told to the other ranks of what it began."""
    before = _thread.caller
    begun: list[tuple[Communicator, str]] = []
    _thread.caller = begun
    try:
        yield
    except BaseException as error:
        for comm, what in reversed(begun):
            if comm.in_call:
                _tell(comm, what, error)
        raise
    finally:
        _thread.caller = before


def _tell(comm: Communicator, what: str, error: object, kind: type | None = None) -> None:
    comm.abort_call(f"raised {(kind or type(error)).__name__}: {error} (in compiled {what})")


def _look_for_an_exception(comm: Communicator, what: str) -> None:
    """Until ``end_call``: an exception that leaves the compiled code is told to the other ranks.

    Where that code is called by somebody else's, there is no ``except``: fullgraph=True has none. Python's trace
    function of its frame is called with what is raised in it; it makes all of Python slower meanwhile. Where a debugger
    has that function already, the others wait for this rank's process to end.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_COMPILED):
        frame = frame.f_back
    if frame is None or sys.gettrace() not in (None, _look_at_no_frame):
        return

    def look(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "exception":
            sys.settrace(None)
            _tell(comm, what, arg[1], arg[0])
        return look

    frame.f_trace, frame.f_trace_lines = look, False
    sys.settrace(_look_at_no_frame)


def _look_at_no_frame(frame: FrameType, event: str, arg: Any) -> None:
    """Of those that begin; to have it set is what has Python look at the frame that runs already."""


_NOT_COMPILED = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))


# AOTAutograd caches on disk what it made of a graph, and does not know of the rules that made it.
_THIS_PROCESS = secrets.token_hex(8)


def _enter(tensor: Tensor, dim: int, name: str, options: str, process: str) -> Tensor:
    region = Region(communicator_of(name), Options.unpacked(options))
    sizes = [operator.index(n) for n in tensor.shape]  # layouts are constants: no size is a symbol
    return shard_input(tensor if isinstance(tensor, PatchTensor) else tensor.view(sizes), dim, region)


def enter_compiled(tensor: Tensor, dim: int, name: str, options: Options) -> Tensor:
    """As ``shard_input``, of the communicator of this name."""
    return torch.ops.distpatch.enter(tensor, dim, name, options.packed, _THIS_PROCESS)


def _gather(tensor: Tensor, op: str) -> Tensor:
    assert isinstance(tensor, PatchTensor)
    return gather_rows(tensor.local, tensor.row_layout, tensor.region.comm.name, op)


for _schema, _function in (
    ("enter(Tensor x, int dim, str name, str options, str process) -> Tensor", _enter),
    ("gather(Tensor x, str op) -> Tensor", _gather),
):
    _name = library.define(_schema)
    library.impl(_name, _function, "CompositeImplicitAutograd")


def _on_sharded(function: Any) -> Any:
    return lambda func, *args: function(*args)


for _op, _function in ((torch.ops.distpatch.enter, _enter), (torch.ops.distpatch.gather, _gather)):
    RULES[_op] = RULES[_op.default] = RuleEntry(_on_sharded(_function))
