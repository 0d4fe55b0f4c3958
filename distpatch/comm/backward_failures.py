"""An exception in a backward pass is told to the ranks that wait for this one's gradients.

A backward pass belongs to no call of a model: torch's engine is where it begins and ends (docs/torch-changes.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.communicator import Communicator, connected, connected_as
from distpatch.torch_utils import patches, private


def _run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
    here = get_ident()  # which runs the pass, too (collectives.in_one_thread)
    opened = [comm for comm in connected() if comm.thread == here and not (comm.in_call or comm.broken)]
    for comm in opened:
        comm.in_call = True
    try:
        result = _PATCH.original(outputs, *args, **kwargs)
        for comm in opened:
            comm.end_call()
        return result
    except BaseException as error:
        for comm in _communicators(outputs):
            comm.abort_call(f"raised {type(error).__name__}: {error} (in a backward pass)")
        raise
    finally:
        for comm in opened:
            comm.in_call = False


def _communicators(outputs: Iterable[Any]) -> set[Communicator]:
    """Those that anything behind the outputs was sent by; all, where compiled code is, which cannot be looked into."""
    nodes = [output.grad_fn if isinstance(output, Tensor) else output.node for output in outputs]
    seen, found = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if type(node).__name__.startswith("CompiledFunction"):
            found.update(connected())
        elif isinstance(name := getattr(node, "name", None), str) and (comm := connected_as(name)) is not None:
            found.add(comm)  # a node of comm/: each has its communicator's name
        behind = [following for following, _ in node.next_functions if following not in seen]
        seen.update(behind)
        nodes += behind
    return found


_PATCH = patches.register(torch.autograd, private.RUN_BACKWARD, _run_backward, by_name=True)
