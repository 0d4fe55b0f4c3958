"""``convert_model``: the calls of a model enter and leave the sharded computation; nothing else changes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distpatch.comm import devices
from distpatch.comm.collectives import in_one_thread, replicated_operands
from distpatch.comm.communicator import Communicator, communicator
from distpatch.comm.dtensors import is_dtensor, same_part
from distpatch.comm.meshes import Mesh, Ranks, axes_of
from distpatch.errors import DistPatchError, LayoutError, UnsupportedOpError
from distpatch.model import exported as _exported
from distpatch.model.arguments import problem_of, signature_of
from distpatch.model.calls import STATE, Call, Conversion, inside, leave, sharded_buffers
from distpatch.model.compile_ops import begin_call, end_call, enter_compiled
from distpatch.model.compiled_calls import compiled_calls
from distpatch.model.entrance import Entrance
from distpatch.model.known_torch_bugs import warn_of_known_faults
from distpatch.model.policy import Policy
from distpatch.model.speeds import weights_for
from distpatch.tensor.options import Options
from distpatch.tensor.patch_tensor import PatchTensor, gather_replicated, nested
from distpatch.tensor.region import CallState, Region
from distpatch.torch_utils import private
from distpatch.torch_utils.tree import map_tensors, tensors_in

assert _exported  # imported for the table of rules

M = TypeVar("M", bound=nn.Module)

ENTRY_POINTS = ("forward", "encode", "decode")
_ABSENT = object()
NOT_COMPILED = "a model that is sharded along several dims runs as it is: shard it along one to compile it"
SAMPLED = 1 << 16  # elements of each parameter that the ranks compare when a model is converted


def convert_model(
    model: M,
    group: Mesh = None,
    *,
    splits: int | str = "auto",
    sequential: bool = True,
    dim: int | Sequence[int] = -2,
    output: str = "gather",
    fallback: str = "warn",
    tiled: bool = False,
    min_numel: int = 0,
    workspace_bytes: int | None = None,
    lazy: bool = True,
    liveness: float | None = 3.0,
    late_check: bool = False,
    compile: bool | dict[str, Any] = False,
    overlap: bool = True,
    weights: Sequence[float] | str | None = None,
    policy: str = "shard",
    shard: Mapping[str, int] | None = None,
    attention: str = "gather",
) -> M:
    """Make a model run on all ranks of a group, each computing its rows of every activation.

    The model's ``forward`` and, where it has them, ``encode`` and ``decode`` are wrapped on the
    instance: image-like tensor arguments (floating point, at least 4 dims) are sharded along ``dim``,
    everything else is replicated, and results are gathered. Class, submodules, parameters, hooks and
    state dict stay; ``restore_model`` undoes it. Every rank of the group calls this, with the same model.

    ``group``: a ProcessGroup, a 1-D DeviceMesh, or None for this device alone. ``dim``: with several, such as
    ``(-2, -1)``, ``group`` is a DeviceMesh of as many axes, or a group for each: image-like arguments are sharded along
    each dim over its axis (docs/meshes.md); without ``compile``, ``weights`` and ``policy``. ``splits``: patches that
    each rank's rows are convolved in, one after the other (``sequential``) or folded into the batch, where its
    rows of the input have at least ``min_numel`` elements; "auto": as few as keep the input and output of each
    call together under ``workspace_bytes`` (by default 8 MiB on CPUs, which is also faster; else 256 MiB). With
    ``lazy`` (and without gradients) norms, activations, resizes and the like are computed for a patch at a
    time, when a convolution reads them, and never exist as a whole. ``output``: "gather" (plain, on every
    rank), "shard" (a PatchTensor) or "rank0" (plain on the group's rank 0, None elsewhere). ``fallback``: what
    an operation without a sharded rule does: "warn" (gather, and say so once), "allow" or "error". ``tiled``:
    allow a model that is set to work in tiles (``use_tiling``): each tile is then cut out of the sharded image,
    as on one device, with its seams. ``liveness``: seconds that a rank's process may be stopped before the others give
    up and name it (of another host, of which nothing is heard: three times as many); None: the group's timeout. How
    long a rank computes is no matter. ``late_check``: on GPUs, do not wait at the end of a call until all that other
    ranks sent is known to have landed: a failure is then raised by the next call (for loops of many short calls).
    ``overlap``: without gradients, rows that need no halo are computed while it is under way; False: it is waited for
    first. The result has the same bits.

    ``weights``: one positive number a rank, in proportion to which ranks get rows (None: evenly), or "measured": each
    rank times a short convolution now. ``policy``: "shard", or "auto": of each shape, the first calls are tried sharded
    and computed whole by every rank, and the faster way is kept, unless the whole may take much memory or ranks may
    round differently (docs/speed.md; ``trace()`` says which calls these were).

    ``shard``: for models of tokens (B, N, C), which arguments are sharded along which dim, by name:
    ``{"hidden_states": 1, "img_ids": 0}``; all others are replicated then, images too. None: as the model's own plan
    for context parallelism says (``_cp_plan`` of diffusers), where that splits the first argument as it is given;
    else images are sharded.

    ``attention``: how the keys and values of all ranks meet a rank's queries: "gather" (all at once; of large ones
    some heads at a time), "ring" (one rank's after the other: in inference no rank ever holds all; with gradients or a
    mask scores are made in plain products) or "all_to_all" (each rank attends with all queries of some heads: fewer
    bytes from three ranks on); "auto": of these, for each attention, what its sizes speak for. All are exact; what does
    not fit them (fewer heads than ranks, replicated keys) is gathered.

    ``compile=True``: each entry point is one graph of ``torch.compile``, made at the first call of each shape, in which
    the ranks meet as in a plain call: rules run when it is made, and not again. A dict: what ``torch.compile`` is
    told beside that, such as ``{"mode": "max-autotune"}``. Displaced steps run as without it. From torch 2.13.

    Returns the model. Raises ``DistPatchError`` where it is converted already, ``RankError`` where a rank
    is missing, is no member, or has other weights or options, ``ValueError`` for an option out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_model takes an nn.Module, got {type(model).__name__}")
    if is_converted(model):
        raise DistPatchError(f"this {type(model).__name__} is converted already; call distpatch.restore_model first")
    options = Options(
        splits,
        sequential,
        dim,  # type: ignore[arg-type]  # it is checked there
        output,
        fallback,
        tiled,
        min_numel,
        workspace_bytes,
        lazy,
        liveness,
        late_check,
        compile,
        overlap,
        weights,  # type: ignore[arg-type]  # it is made a tuple there
        policy,
        shard,  # type: ignore[arg-type]  # and so is this
        attention,
    )
    if problem := _tiles(model, tiled):
        raise LayoutError(problem)
    warn_of_known_faults(model)
    dims = (options.dim,) if isinstance(options.dim, int) else options.dim
    one = len(dims) == 1 and not isinstance(group, (tuple, list))
    device = devices.of_model(model)
    ranks = Ranks([communicator(group, device)] if one else axes_of(group, dims, device))  # type: ignore[arg-type]
    comm = ranks.whole
    comm.rendezvous.require_same_call("convert_model", lambda: _identity(model, comm, options))
    options = replace(options, weights=weights_for(options.weights, comm, model))
    ranks.wait_at_most(liveness, late_check)
    state = Conversion(
        nested(ranks.axes, dims, options, object()), ranks, options, entrances=_entrances(model, options)
    )
    auto = Policy(comm) if policy == "auto" and comm.has_peers else None
    wrappers = {
        name: compiled_calls(_entry(getattr(model, name), name, state, model, auto), state) for name in state.entrances
    }
    model.__dict__[STATE] = state
    for name, wrapper in wrappers.items():
        state.before[name] = model.__dict__.get(name, _ABSENT)
        model.__dict__[name] = wrapper if len(dims) == 1 else torch.compiler.disable(wrapper, reason=NOT_COMPILED)
    return model


def _entrances(model: nn.Module, options: Options) -> dict[str, Entrance]:
    """What enters each entry point. Raises ``ValueError`` where ``shard`` names what none of them takes."""
    found = {
        name: Entrance(f"{type(model).__name__}.{name}", getattr(model, name), model, options)
        for name in ENTRY_POINTS
        if callable(getattr(model, name, None))
    }
    for name, _ in options.shard or ():
        if not any(name in entrance.splits for entrance in found.values()):
            taken = "; ".join(f"{entrance.what} takes {', '.join(entrance.places)}" for entrance in found.values())
            raise ValueError(f"convert_model: shard= names {name!r}, which is no argument of the model: {taken}")
    return found


def unwrap(model: nn.Module) -> None:
    """Give a model its own entry points back."""
    state = model.__dict__.pop(STATE)
    for name, before in state.before.items():
        if before is _ABSENT:
            del model.__dict__[name]
        else:
            model.__dict__[name] = before


def is_converted(model: nn.Module) -> bool:
    """Whether ``convert_model`` was called on it, and not undone."""
    return STATE in model.__dict__


def _tiles(model: Any, allowed: bool) -> str | None:
    """Why a model that is set to cut its input into tiles is not sharded, or None."""
    if allowed or not getattr(model, "use_tiling", False):
        return None
    return (
        f"{type(model).__name__} is set to work in tiles, which are not exact, and of which only some ranks would have "
        "rows. The ranks take the place of tiles: call disable_tiling() on the model, or pass tiled=True where it "
        "cannot do without them."
    )


def _identity(model: nn.Module, comm: Communicator, options: Options) -> str:
    """What must be the same on all ranks: class, options, parameter shapes, and a sample of their bits.

    Ranks that built a model from different seeds would each compute rows of another picture. Of a DTensor (FSDP2)
    ranks of its own mesh hold parts, which differ.
    """
    digest = hashlib.sha256()
    sums = []
    for name, held in model.state_dict().items():
        if not isinstance(held, Tensor):
            continue
        digest.update(f"{name} {tuple(held.shape)} {held.dtype}".encode())
        tensor = same_part(held, comm) if is_dtensor(held) else held
        if tensor is None:
            continue
        sums += [_sum_of_bits(part) for part in private.wrapped_tensors(tensor) if _has_bits(part)]
    if sums:
        digest.update(str(torch.stack(sums).tolist()).encode())
    return f"{type(model).__name__} with options ({options}), state {digest.hexdigest()[:16]}"


def _has_bits(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.numel() > 0 and not isinstance(tensor, PatchTensor)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(flat.numel() // SAMPLED, 1)].contiguous().view(torch.uint8)
    weights = torch.arange(sample.numel(), device=sample.device) % 251 + 1
    return (sample * weights).sum().cpu()


def _entry(
    function: Callable[..., Any], name: str, state: Conversion, model: nn.Module, policy: Policy | None
) -> Callable[..., Any]:
    """The wrapper of one entry point. Calls from inside the sharded computation pass straight through."""
    entrance = state.entrances[name]
    what = entrance.what

    @functools.wraps(function)
    def entry(*args: Any, **kwargs: Any) -> Any:
        if state.thread.inside:
            return function(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return _compiled(function, entrance, state, model, args, kwargs)
        private.recompute_to_the_end()  # the ranks leave a call together
        call = Call(entrance, state, model, args, kwargs)
        steps = state.steps if name == "forward" else None
        problem = _tiles(model, state.options.tiled) or call.problem
        if steps is not None:
            problem = problem or steps.problem(what)

        def run() -> Any:
            sharded = call.enter(_region(state, model))
            return function(*sharded[0], **sharded[1])

        trial = None if policy is None or problem or steps is not None else policy.trial_of(call)
        if trial is not None and trial.needs_nobody(state.options.output):
            with state.thread.as_if(inside=True):
                return trial.run(call, run, function)
        with inside(state, what, problem or call.signature, problem, steps or trial, call.replicated):
            if trial is not None:
                return trial.run(call, run, function)
            return call.leave(run() if steps is None else steps.step(run))

    return entry


def _compiled(
    function: Callable[..., Any], entrance: Entrance, state: Conversion, model: nn.Module, args: Any, kwargs: Any
) -> Any:
    """As ``entry``, in a form that torch.compile can trace; the ranks meet whenever the graph runs."""
    region, what = state.region, entrance.what
    given = list(tensors_in((args, kwargs)))
    problem = _tiles(model, state.options.tiled) or problem_of(entrance, (args, kwargs), given, region)
    if state.steps is not None:
        problem = f"{what}: a compiled call is never a displaced step: compile the modules inside the model instead"
    if problem:
        raise LayoutError(problem)
    beside = [given[0].detach()]
    begin_call(beside, region.comm.name, what, signature_of(given))
    state.thread.inside = True
    sharded = entrance.mapped(lambda t, dim: enter_compiled(t, dim, region.comm.name, region.options), args, kwargs)
    result = function(*sharded[0], **sharded[1])
    state.thread.inside = False
    for buffers, key, buffer in sharded_buffers(model):
        buffers[key] = gather_replicated(buffer)
    left = map_tensors(lambda t: leave(t, state), result)
    end_call([t.detach() for t in tensors_in(left)][:1] or beside, region.comm.name)
    return left


def _region(state: Conversion, model: Any) -> Region:
    """The region of one call: where gradients are wanted, with stand-ins for the model's parameters.

    Those that FSDP2 keeps in parts are plain ones only inside the modules that gather them, and are spread there.
    """
    if private.functorch_transform() is not None:
        raise UnsupportedOpError(
            f"{type(model).__name__} is converted, and torch.func (grad, vjp, jvp, jacrev, hessian, vmap) has no rules "
            "for what moves between ranks: use torch.autograd.grad(create_graph=True), or torch.autograd.functional "
            "(vjp, jvp, hvp, vhp, jacobian, hessian)"
        )
    if not (state.ranks.whole.name and torch.is_grad_enabled() and isinstance(model, nn.Module)):
        return state.region
    parameters = [p for p in model.parameters() if p.requires_grad and not is_dtensor(p)]
    if parameters:
        in_one_thread(parameters[0].device)
    return _with_stand_ins(state.region, parameters)


def _with_stand_ins(region: Region, parameters: Sequence[Tensor]) -> Region:
    """On each axis those of the axis outside it meet rows: their gradients are summed over one after the other."""
    name = region.comm.name
    stand_ins = replicated_operands(parameters, name) if parameters and name else list(parameters)
    replicas = {id(parameter): (parameter, other) for parameter, other in zip(parameters, stand_ins, strict=True)}
    inner = None if region.inner is None else _with_stand_ins(region.inner, stand_ins)
    return replace(region, call=CallState(replicas), inner=inner)
