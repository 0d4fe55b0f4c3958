"""``convert_model``: the calls of a model enter and leave the sharded computation; nothing else changes."""

from __future__ import annotations

import functools
import hashlib
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distpatch import rules as _rules
from distpatch.collectives import spread_all
from distpatch.compiled import enter, enter_compiled, meet
from distpatch.errors import DistPatchError, LayoutError
from distpatch.group import Group, Pretended, communicator
from distpatch.known_faults import warn_of_known_faults
from distpatch.rules.blocks import in_order
from distpatch.tensor import PatchTensor, Region, on_rank0, whole
from distpatch.tree import map_tensors, tensors_in

__all__ = ["convert_model", "restore_model"]
assert _rules  # imported for the table of rules

M = TypeVar("M", bound=nn.Module)

ENTRY_POINTS = ("forward", "encode", "decode")
STATE = "_distpatch"
_ABSENT = object()
SAMPLED = 1 << 16  # elements of each parameter that the ranks compare when a model is converted


class _Thread(threading.local):
    def __init__(self) -> None:
        self.inside = False  # the sharded computation


@dataclass
class _Conversion:
    """What was done to a model, and what is needed to undo it."""

    region: Region
    dim: int
    output: str
    tiled: bool = False
    steps: Any = None  # the displaced context that is open (displaced.py)
    before: dict[str, Any] = field(default_factory=dict)
    thread: _Thread = field(default_factory=_Thread)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DistPatchError(
            "a converted model can be neither copied (copy.deepcopy) nor pickled: its entry points are tied to this "
            "model and its group. Copy it before it is converted, or after distpatch.restore_model; its state dict "
            "can be saved at any time."
        )


def convert_model(
    model: M,
    group: Group = None,
    *,
    splits: int | str = "auto",
    sequential: bool = True,
    dim: int = -2,
    output: str = "gather",
    fallback: str = "warn",
    tiled: bool = False,
    min_numel: int = 0,
    workspace_bytes: int | None = None,
    lazy: bool = True,
) -> M:
    """Make a model run on all ranks of a group, each computing its rows of every activation.

    The model's ``forward`` and, where it has them, ``encode`` and ``decode`` are wrapped on the
    instance: image-like tensor arguments (floating point, at least 4 dims) are sharded along ``dim``,
    everything else is replicated, and results are gathered. Class, submodules, parameters, hooks and
    state dict stay; ``restore_model`` undoes it. Every rank of the group calls this, with the same model.

    ``group``: a ProcessGroup, a 1-D DeviceMesh, or None for this device alone. ``splits``: patches that
    each rank's rows are convolved in, one after the other (``sequential``) or folded into the batch, where its
    rows of the input have at least ``min_numel`` elements; "auto": as few as keep the input and output of each
    call together under ``workspace_bytes`` (by default 8 MiB on CPUs, which is also faster; else 256 MiB). With
    ``lazy`` (and without gradients) norms, activations, resizes and the like are computed for a patch at a
    time, when a convolution reads them, and never exist as a whole. ``output``: "gather" (plain, on every
    rank), "shard" (a PatchTensor) or "rank0" (plain on the group's rank 0, None elsewhere). ``fallback``: what
    an operation without a sharded rule does: "warn" (gather, and say so once), "allow" or "error". ``tiled``:
    allow a model that is set to work in tiles (``use_tiling``): each tile is then cut out of the sharded image,
    as on one device, with its seams.

    The converted model, or an entry point of it, can be compiled with ``torch.compile(..., fullgraph=True)``;
    each shape of the arguments has a graph of its own, in which the ranks meet as in a plain call.

    Returns the model. Raises ``DistPatchError`` where it is converted already, ``RankError`` where a rank
    is missing, is no member, or has other weights or options, ``ValueError`` for an option out of range.
    """
    _check_options(model, splits, dim, output, fallback)
    if min_numel < 0 or (workspace_bytes is not None and workspace_bytes < 1):
        raise ValueError(f"min_numel and workspace_bytes are positive; got {min_numel} and {workspace_bytes}")
    if problem := _tiles(model, tiled):
        raise LayoutError(problem)
    warn_of_known_faults(model)
    comm = communicator(group)
    if comm.size > 1 and not isinstance(comm, Pretended):
        comm.agree("convert_model", _identity(model, splits, sequential, dim, output, fallback))
    region = Region(
        comm,
        splits,
        sequential,
        fallback,
        min_numel,
        workspace_bytes,
        lazy,
        buffers=frozenset(map(id, model.buffers())),
    )
    state = _Conversion(region, dim, output, tiled)
    wrappers = {
        name: _entry(getattr(model, name), name, state) for name in ENTRY_POINTS if callable(getattr(model, name, None))
    }
    model.__dict__[STATE] = state
    for name, wrapper in wrappers.items():
        state.before[name] = model.__dict__.get(name, _ABSENT)
        model.__dict__[name] = wrapper
    return model


def restore_model(model: M) -> M:
    """Undo ``convert_model``: the model is as it was, and runs on this device alone."""
    state = model.__dict__.get(STATE)
    if state is None:
        raise DistPatchError(f"restore_model: this {type(model).__name__} is not converted")
    for name, before in state.before.items():
        if before is _ABSENT:
            del model.__dict__[name]
        else:
            model.__dict__[name] = before
    del model.__dict__[STATE]
    return model


def is_converted(model: nn.Module) -> bool:
    """Whether ``convert_model`` was called on it, and not undone."""
    return STATE in model.__dict__


def _check_options(model: nn.Module, splits: int | str, dim: int, output: str, fallback: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_model takes an nn.Module, got {type(model).__name__}")
    if is_converted(model):
        raise DistPatchError(f"this {type(model).__name__} is converted already; call distpatch.restore_model first")
    if splits != "auto" and not (isinstance(splits, int) and splits >= 1):
        raise ValueError(f'splits is a number of at least 1, or "auto"; got {splits!r}')
    if not isinstance(dim, int):
        raise ValueError(f"dim is a number, got {dim!r}")
    for name, value, choices in (
        ("output", output, ("gather", "shard", "rank0")),
        ("fallback", fallback, ("warn", "allow", "error")),
    ):
        if value not in choices:
            raise ValueError(f"{name} is one of {choices}; got {value!r}")


def _tiles(model: Any, allowed: bool) -> str | None:
    """Why a model that is set to cut its input into tiles is not sharded, or None."""
    if allowed or not getattr(model, "use_tiling", False):
        return None
    return (
        f"{type(model).__name__} is set to work in tiles, which are not exact, and of which only some ranks would have "
        "rows. The ranks take the place of tiles: call disable_tiling() on the model, or pass tiled=True where it "
        "cannot do without them."
    )


def _identity(model: nn.Module, *options: Any) -> str:
    """What must be the same on all ranks: class, options, parameter shapes, and a sample of their bits.

    Ranks that built a model from different seeds would each compute rows of another picture.
    """
    digest = hashlib.sha256()
    sums = []
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel() and not isinstance(tensor, PatchTensor):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(flat.numel() // SAMPLED, 1)].contiguous().view(torch.uint8)
            weights = torch.arange(sample.numel(), device=sample.device) % 251 + 1
            sums.append((sample * weights).sum().cpu())
    if sums:
        digest.update(str(torch.stack(sums).tolist()).encode())
    return f"{type(model).__name__} with options {options}, state {digest.hexdigest()[:16]}"


def _entry(call: Callable[..., Any], name: str, state: _Conversion) -> Callable[..., Any]:
    """The wrapper of one entry point. Calls from inside the sharded computation pass straight through."""

    @functools.wraps(call)
    def entry(*args: Any, **kwargs: Any) -> Any:
        if state.thread.inside:
            return call(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return _compiled(call, name, state, args, kwargs)
        model = getattr(call, "__self__", None)
        steps = state.steps if name == "forward" else None

        def run() -> Any:
            region = _region(state, model)
            sharded = map_tensors(lambda t: enter(t, state.dim, region) if is_image(t) else t, (args, kwargs))
            return call(*sharded[0], **sharded[1])

        with _inside(state, model, f"{type(model).__name__}.{name}", args, kwargs, steps):
            result = run() if steps is None else steps.step(run)
            return map_tensors(lambda t: _leave(t, state), result)

    return entry


def _compiled(call: Callable[..., Any], name: str, state: _Conversion, args: Any, kwargs: Any) -> Any:
    """As ``entry``, in a form that torch.compile can trace; the ranks meet whenever the graph runs."""
    region = state.region
    model = getattr(call, "__self__", None)
    what = f"{type(model).__name__}.{name}"
    problem = _tiles(model, state.tiled) or _problem(what, args, kwargs, state)
    if state.steps is not None:
        problem = f"{what}: a compiled call is never a displaced step: compile the modules inside the model instead"
    if problem:
        raise LayoutError(problem)
    meet(region.comm.name, what, _signature(args, kwargs))
    state.thread.inside = True
    sharded = map_tensors(lambda t: enter_compiled(t, state.dim, region) if is_image(t) else t, (args, kwargs))
    result = call(*sharded[0], **sharded[1])
    state.thread.inside = False
    return map_tensors(lambda t: _leave(t, state), result)


@contextmanager
def _inside(state: _Conversion, model: Any, what: str, args: Any, kwargs: Any, steps: Any) -> Iterator[None]:
    """Meet the other ranks, then mark this thread as inside; an error is noted for ranks that wait."""
    comm = state.region.comm
    problem = _tiles(model, state.tiled) or _problem(what, args, kwargs, state)
    if steps is not None:
        problem = problem or steps.problem(what)
    signature = problem or _signature(args, kwargs)
    answers = comm.enter(what, signature, None if steps is None else steps.payload((args, kwargs)))
    if problem:
        raise LayoutError(problem)
    state.thread.inside = True
    try:
        if steps is not None:
            steps.begin(signature, answers)
        yield
    except BaseException as error:
        comm.leave_broken(f"raised {type(error).__name__}: {error}")
        raise
    finally:
        state.thread.inside = False


def _signature(args: Any, kwargs: Any) -> str:
    described = []
    for tensor in tensors_in((args, kwargs)):
        layout = f" {tensor.rows}" if isinstance(tensor, PatchTensor) else ""
        shape = tuple(operator.index(n) for n in tensor.shape)  # a compiled graph is made for this shape alone
        described.append(f"{shape} {tensor.dtype}{layout}")
    grads = " with gradients" if torch.is_grad_enabled() else ""
    return "(" + ", ".join(described) + ")" + grads


def is_image(tensor: Tensor) -> bool:
    return isinstance(tensor, PatchTensor) or (tensor.is_floating_point() and tensor.ndim >= 4)


def _problem(what: str, args: Any, kwargs: Any, state: _Conversion) -> str | None:
    """Why these arguments cannot be sharded, or None."""
    tensors = list(tensors_in((args, kwargs)))
    images = [tensor for tensor in tensors if is_image(tensor)]
    if not images:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors) or "none"
        return (
            f"{what}: no argument can be sharded: an image is a floating-point tensor of at least 4 dims "
            f"(B, C, H, W); the tensors given are: {shapes}"
        )
    for tensor in images:
        if isinstance(tensor, PatchTensor):
            if tensor.region.comm is not state.region.comm:
                shape = tuple(tensor.shape)
                return f"{what}: an argument of shape {shape} is sharded over another group than the model's"
        elif not -tensor.ndim <= state.dim < tensor.ndim or state.dim % tensor.ndim < 2:
            return (
                f"{what}: dim={state.dim} is out of range for an argument of shape "
                f"{tuple(tensor.shape)}: rows are sharded along one of its spatial dims "
                f"{2 - tensor.ndim}..-1 (convert_model(..., dim=...))"
            )
    return None


def _region(state: _Conversion, model: Any) -> Region:
    """The region of one call: where gradients are wanted, with stand-ins for the model's parameters."""
    name = state.region.comm.name
    if not (name and torch.is_grad_enabled() and isinstance(model, nn.Module)):
        return state.region
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stand_ins = spread_all(parameters, name) if parameters else []
    pairs = zip(parameters, stand_ins, strict=True)
    return replace(state.region, replicas={id(parameter): (parameter, other) for parameter, other in pairs})


def _leave(tensor: Tensor, state: _Conversion) -> Any:
    if not isinstance(tensor, PatchTensor):
        return whole(tensor)
    if torch.compiler.is_dynamo_compiling() and state.output != "shard":
        whole_output = torch.ops.distpatch.gather(tensor, "output")
        return whole_output if state.output == "gather" or state.region.comm.rank == 0 else None
    comm = tensor.region.comm
    if state.output == "gather":
        if comm.size == 1:
            return tensor.local  # all of it, and nobody else's: no copy
        return whole(tensor, "output")
    ordered = in_order(tensor)
    assert isinstance(ordered, PatchTensor)
    ordered.local  # noqa: B018  nothing waits for a model that has returned
    return ordered if state.output == "shard" else on_rank0(ordered, "output")
