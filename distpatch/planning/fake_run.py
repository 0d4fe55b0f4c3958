"""``plan``: a model run on fake tensors as any rank of any group, by the same rules as a real one."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from distpatch.comm.meshes import dims_of
from distpatch.comm.simulated import SimulatedCommunicator
from distpatch.errors import DistPatchError, UnsupportedOpError
from distpatch.layout.mesh_shapes import AUTO, choose_mesh
from distpatch.layout.shares import checked, shared_bounds, weights_of
from distpatch.lazy.row_patches import chosen_by
from distpatch.model.convert import convert_model, is_converted
from distpatch.model.entrance import Entrance
from distpatch.model.restore import restore_model
from distpatch.model.speeds import MEASURED
from distpatch.planning.hardware import Device, Link, device_named, link_named
from distpatch.planning.rank_report import RankPlan
from distpatch.planning.ranks_to_run import places_of, ranks_to_run
from distpatch.planning.report import Plan
from distpatch.profiling.op_costs import Meter, representatives
from distpatch.profiling.trace import trace
from distpatch.tensor.options import Options
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.chunk_sizes import planned_as
from distpatch.torch_utils.private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    detect_fake_mode,
    in_kernel_invocation_manager,
)
from distpatch.torch_utils.tree import map_tensors, tensors_in

MOST_RANKS = 1 << 16
FAKES_ARE_ON = "cpu"  # which every build of torch has


def plan(
    model: nn.Module,
    *args: Any,
    world_size: int | Sequence[int] = 8,
    method: str | None = None,
    device: Device | str = "H100",
    host: float | None = None,
    link: Link | str | None = None,
    ranks: Sequence[int] | None = None,
    backward: bool = False,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Plan:
    """What ``model(*args, **kwargs)`` would need and do on each of ``world_size`` ranks; nothing is computed.

    >>> print(distpatch.plan(vae, torch.empty(1, 4, 1024, 1024, device="meta"), method="decode").table())

    The rules run on fake tensors, for a group that does not exist. The model and the arguments may be real or on
    the meta device, and are left as they are; of tensors only shapes, dtypes and strides are read.

    ``world_size``: of a group, or how many ranks each axis of a mesh has, with as many dims in the options:
    ``world_size=(8, 8), options={"dim": (-2, -1)}``; ``{"dim": "auto"}`` takes the mesh of ``distpatch.choose_mesh``,
    of ``world_size`` ranks. ``method``: the entry point that is called ("decode", "encode"; None: the model itself).
    ``device``: whose rates make the estimate of time: "H100" and others of ``distpatch.costs.DEVICES``, a ``Device``
    such as ``distpatch.calibrate`` measures, or "cpu" for no estimate. ``link``: of ``distpatch.costs.LINKS``; None is
    the device's own, or InfiniBand where there are more than 8 ranks. ``host``: seconds that the host takes to launch
    a kernel, in place of the device's ``launch_seconds``: where kernels are shorter, the host is what takes time
    (``Plan.bound``). ``ranks``: those that are run; None is the
    first, the last, and one of each height between (up to 4 ranks: all). ``backward``: also the backward pass of
    the sum of the results. ``options``: those of ``convert_model`` (splits, output, dim, ...). Without
    ``backward`` it is inference.

    Patches, parts and kernels are those of the kind of ``device`` (``Plan.rules_of``), whatever this machine and
    this build of torch have: the fake tensors are all on the CPU, and the rules are told what to choose for. What
    the model itself decides by a tensor's device, and autocast for "cuda", is not seen. Raises
    ``UnsupportedOpError`` where the model asks for the value of a tensor, ``DistPatchError`` where it is
    converted already or cannot be copied, ``ValueError`` for an option out of range.
    """
    subject = Subject(model, args, kwargs, method=method, device=device, host=host, backward=backward, options=options)
    return subject.plan(world_size, link=link, ranks=ranks)


def smallest_plan(
    model: nn.Module,
    *args: Any,
    memory_bytes: float | None = None,
    most: int = 1024,
    method: str | None = None,
    device: Device | str = "H100",
    host: float | None = None,
    link: Link | str | None = None,
    backward: bool = False,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Plan | None:
    """The plan for the fewest ranks of which each needs at most ``memory_bytes`` (None: the device's memory).

    Arguments as those of ``plan``. None where not even ``most`` ranks do. Taken to be true, and not checked: more
    ranks never need more memory each.
    """
    subject = Subject(model, args, kwargs, method=method, device=device, host=host, backward=backward, options=options)
    if memory_bytes is None and subject.device is None:
        raise ValueError("smallest_plan: say how many bytes a rank has (memory_bytes), or name a device")

    def fits(size: int) -> bool:  # judged by the rank that has neighbours on both sides
        return subject.plan(size, link=link, ranks=[min(1, size - 1)]).fits(memory_bytes)

    low, high = 0, 1
    while not fits(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:  # low does not fit, high does
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    for size in range(high, most + 1):
        if (found := subject.plan(size, link=link)).fits(memory_bytes):
            return found
    return None


VIEWS = {torch.ops.aten.slice.Tensor, torch.ops.aten.view.default}


class Faking(FakeTensorMode):
    """Fake tensors with a short path for views, a third of a plan's operations, and for sums, products, comparisons.

    torch's own path is slow, and gives results of these other strides than real ones have in dims of size 1. By those
    its kernels tell memory formats apart, so that all that follows could stand in another order.
    """

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_two = _of_two_tensors(func)
        if (func in VIEWS and self._is_own(args[0])) or (of_two and self._are_operands(args[:2])):
            with in_kernel_invocation_manager(self):
                if of_two:
                    func, args = of_two, tuple(map(_of_no_dims, args))
                rows = func(*args, **(kwargs or {}))
            return FakeTensor(self, rows, torch.device(FAKES_ARE_ON))
        return super().dispatch(func, types, args, kwargs)

    def _is_own(self, operand: Any) -> bool:
        return type(operand) is FakeTensor and operand.fake_mode is self

    def _are_operands(self, operands: Sequence[Any]) -> bool:
        """Own tensors and numbers, beside a tensor with dims: only there a number counts as one of no dims does."""
        tensors = [operand for operand in operands if not isinstance(operand, (int, float))]
        return all(map(self._is_own, tensors)) and any(tensor.ndim for tensor in tensors)


@functools.cache
def _of_two_tensors(func: Any) -> Any:
    """The overload for two tensors of an element-wise function of two tensors, or of a tensor and a number; or None."""
    if torch.Tag.pointwise not in func.tags or func._overloadname not in ("Tensor", "Scalar"):
        return None
    of_two = getattr(func.overloadpacket, "Tensor", None)
    if of_two is None:
        return None
    positional = [argument for argument in of_two._schema.arguments if not argument.kwarg_only]
    return of_two if len(positional) == 2 and not of_two._schema.is_mutable else None


def _of_no_dims(operand: Any) -> Any:
    """A number as the tensor that kernels make of it: with plain numbers torch's meta functions give other strides."""
    return operand if isinstance(operand, Tensor) else torch.tensor(operand, device="meta")


class Subject:
    """A fake copy of a model and its arguments, to be run as any rank of a group of any size."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        method: str | None,
        device: Device | str,
        host: float | None,
        backward: bool,
        options: Mapping[str, Any] | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"plan takes an nn.Module, got {type(model).__name__}")
        if is_converted(model):
            raise DistPatchError(f"plan: this {type(model).__name__} is converted; call distpatch.restore_model first")
        self.name, self.method = type(model).__name__, method or "forward"
        if not callable(getattr(model, self.method, None)):
            raise ValueError(f"plan: {self.name} has no method {self.method!r}")
        self.device, self.backward = device_named(device, host), backward
        self.options = {"fallback": "allow", **(options or {})}
        self.kind = "cpu" if self.device is None else self.device.kind
        given = [*model.parameters(), *model.buffers(), *tensors_in((args, kwargs))]
        self.mode = detect_fake_mode([t for t in given if isinstance(t, FakeTensor)]) or Faking()
        self.model = self._copy(model)
        self.args, self.kwargs = map_tensors(self._fake, (args, kwargs))
        function, chosen = getattr(self.model, self.method), {**self.options}
        if chosen.get("dim") == AUTO:
            del chosen["dim"]  # it is chosen by the number of ranks
        dims = Entrance(self.name, function, self.model, Options(**chosen)).dims(self.args, self.kwargs)
        sharded = {t: dim for t in tensors_in((self.args, self.kwargs)) if (dim := dims.of(t)) is not None}
        self.shapes = tuple(tuple(t.shape) for t in sharded)
        self.named_dims = [dim for dim in list(sharded.values())[:1] if dims.named is not None and isinstance(dim, int)]

    def plan(
        self, world_size: int | Sequence[int], *, link: Link | str | None = None, ranks: Sequence[int] | None = None
    ) -> Plan:
        """``ranks``: those that are run; the others are taken to do what one of these of their kind does."""
        mesh, dims = self._mesh(world_size)
        size = math.prod(mesh)
        if min(mesh) < 1 or size > MOST_RANKS:
            raise ValueError(f"world_size is a number from 1 to {MOST_RANKS}, or several; got {world_size}")
        known_link = link_named(link, self.device, size)
        weights = weights_of(self.options.get("weights"))
        shares = None if weights in (None, MEASURED) else checked(weights, size)
        heights = [
            [b - a for a, b in pairwise(shared_bounds(rows, n, shares))]
            for rows, n in zip(self._rows_along(dims), mesh, strict=True)
        ]
        runs = tuple(
            self._run(rank, mesh, dims, heights, stands_for)
            for rank, stands_for in sorted(ranks_to_run(heights, ranks).items())
        )
        return Plan(
            model=self.name,
            method=self.method,
            world_size=size,
            mesh=mesh,
            dims=dims,
            shapes=self.shapes,
            parameter_bytes=_size_bytes(self.model.parameters()),
            buffer_bytes=_size_bytes(self.model.buffers()),
            input_bytes=_size_bytes(tensors_in((self.args, self.kwargs))),
            ranks=runs,
            device=self.device,
            link=known_link,
            rules_of=self.kind,
        )

    def _rows_along(self, dims: Sequence[int]) -> list[int]:
        """How many rows of the first sharded argument each axis shares out."""
        shape = self.shapes[0] if self.shapes else ()
        along = self.named_dims or dims
        return [shape[dim] if -len(shape) <= dim < len(shape) else 0 for dim in along]

    def _mesh(self, world_size: int | Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How many ranks each axis has, and the dim that is sharded over it."""
        mesh = (world_size,) if isinstance(world_size, int) else tuple(world_size)
        if self.options.get("dim") == AUTO:
            chosen = choose_mesh(self.shapes[0], math.prod(mesh))
            return chosen.mesh, chosen.dims
        dim = dims_of(self.options.get("dim", -2))
        dims = (dim,) if isinstance(dim, int) else dim
        if len(dims) != len(mesh):
            raise ValueError(
                f"plan: world_size says how many ranks each axis of a mesh has, one for each dim: world_size=(8, 8), "
                f'options={{"dim": (-2, -1)}}; got world_size={world_size} and dim={dim}'
            )
        return mesh, dims

    def _run(
        self,
        rank: int,
        mesh: tuple[int, ...],
        dims: tuple[int, ...],
        heights: Sequence[Sequence[int]],
        stands_for: int,
    ) -> RankPlan:
        place = places_of(mesh)[rank]
        group = [SimulatedCommunicator(at, size) for at, size in zip(place, mesh, strict=True)]
        rows = tuple(of_axis[at] for of_axis, at in zip(heights, place, strict=True))
        with self.mode, torch.set_grad_enabled(self.backward), self._converted(group, dims), _values_named(self.name):
            with planned_as(self.kind), trace() as seen, Meter() as meter, chosen_by(representatives):
                call: Callable[..., Any] = self.model if self.method == "forward" else getattr(self.model, self.method)
                if self.backward:
                    _sum(call(*self.args, **self.kwargs)).backward()  # the result is not kept
                else:
                    call(*self.args, **self.kwargs)
            for parameter in self.model.parameters():
                parameter.grad = None
        return RankPlan(
            rank,
            rows[0] if len(rows) == 1 else rows,
            stands_for,
            meter.peak_bytes,
            meter.peak_op,
            meter.kernels,
            meter.calls,
            seen,
        )

    @contextmanager
    def _converted(self, axes: list[SimulatedCommunicator], dims: tuple[int, ...]) -> Iterator[None]:
        convert_model(self.model, axes, **{**self.options, "dim": dims})
        try:
            yield
        finally:
            restore_model(self.model)

    def _copy(self, model: nn.Module) -> nn.Module:
        """The model with fake parameters and buffers; nothing of it is shared with the one given."""
        held = [*model.parameters(), *model.buffers()]
        memo: dict[int, Any] = {id(tensor): self._fake(tensor) for tensor in held}
        try:
            with FakeCopyMode(self.mode):
                return copy.deepcopy(model, memo)
        except DistPatchError:
            raise
        except Exception as error:
            raise DistPatchError(
                f"plan: {self.name} cannot be copied ({type(error).__name__}: {error}); remove the attribute or hook "
                "that forbids it, or plan a model built under torch.device('meta')"
            ) from error

    def _fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, PatchTensor):
            raise ValueError("plan: arguments are plain tensors, of the whole image; it shards them itself")
        with self.mode, torch.no_grad():
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=FAKES_ARE_ON)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)


def _sum(result: Any) -> Tensor:
    outputs = [t for t in tensors_in(result) if t.requires_grad]
    if not outputs:
        raise ValueError("plan: backward=True, but no result depends on a tensor that requires a gradient")
    return torch.stack([t.sum() for t in outputs]).sum() if len(outputs) > 1 else outputs[0].sum()


@contextmanager
def _values_named(model: str) -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UnsupportedOpError(
            f"plan: {model} asks for the value of a tensor ({error}), and fake tensors have none. Give it as a number "
            "of Python, or plan the part of the model after it."
        ) from error


def _size_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of memory; a storage that several tensors share counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
