"""``PatchTensor``: one global tensor of which each rank holds its rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from distpatch.comm import collectives
from distpatch.comm.communicator import Communicator, communicator
from distpatch.comm.meshes import Dims, Mesh, Ranks, axes_of, bounds_held, dims_of
from distpatch.comm.row_exchange import fetch_rows
from distpatch.errors import DistPatchError, LayoutError, UnsupportedOpError
from distpatch.layout.blocks import BlockLayout
from distpatch.layout.rows import EMPTY, RowLayout, even_bounds
from distpatch.layout.stencil import Interval
from distpatch.lazy.recipe import Recipe
from distpatch.tensor import sharded_checkpoint
from distpatch.tensor.options import Options, default
from distpatch.tensor.region import Region
from distpatch.tensor.row_copy import RowCopy, below_the_table, refuse_forward_mode
from distpatch.tensor.rule_table import RULES
from distpatch.tensor.user_classes import kind_of, plain
from distpatch.torch_utils import memory_format, private
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors, tensors_in

_new_wrapper = torch.Tensor._make_wrapper_subclass


class _Rows:
    """``PatchTensor.local``: deferred rows are materialised at the first read.

    An attribute of the instance hides it, once there is one.
    """

    def __get__(self, x: PatchTensor | None, cls: Any = None) -> Any:
        if x is None:
            return self
        recipe = x.__dict__["recipe"]
        if recipe.value is None:
            recipe.materialize()
        x.local = recipe.value
        if x.halo_rows is not None and x.halo_rows.version is None:
            x.halo_rows = x.halo_rows._replace(version=version_of(recipe.value))
        return recipe.value


def version_of(rows: Tensor | Recipe) -> int | None:
    """Of rows that exist, how often they were written to; None where nobody counts."""
    return None if isinstance(rows, Recipe) or rows.is_inference() else rows._version


class PatchTensor(torch.Tensor):
    """A tensor sharded by rows over the ranks of a group.

    ``.shape`` is the global shape; ``.local`` this rank's rows, a plain tensor that carries the
    autograd graph; ``.row_layout`` the ``RowLayout``; ``.group`` the process group. Made by ``shard``,
    ``PatchTensor.from_local`` or a converted model; every torch function that meets one is looked up
    in the table of rules.
    """

    local: Tensor = _Rows()  # type: ignore[assignment]
    row_layout: RowLayout
    region: Region
    recipe: Recipe
    row_stride: int = 0  # of a strided slice (x[::step]) of the rows; 0: not one
    strides: tuple[int, ...] | None = None  # of the whole tensor on one device, where those of the rows do not tell
    halo_rows: Any = None  # what is known of its neighbours' rows: ``HaloRows`` (halo_rows.py)
    _shape: torch.Size

    @staticmethod
    def __new__(cls, local: Tensor | Recipe, rows: RowLayout, region: Region) -> PatchTensor:
        if type(rows) is BlockLayout and cls is PatchTensor:
            cls = BlockTensor
        size = list(local.shape)
        size[rows.dim] = rows.size
        shape = torch.Size(size)
        self: PatchTensor = _new_wrapper(cls, shape, dtype=local.dtype, device=local.device)
        if type(local) is Tensor:
            self.local = local
        elif isinstance(local, Recipe):
            self.recipe = local
            local.belong_to(self)
        else:
            if (kind := kind_of(local)) is not None:
                region = replace(region, kind=kind)
            self.local = plain(local)
        self.row_layout = rows
        self.region = region
        self._shape = shape
        return self

    # Plain properties: through __torch_function__ each read would cost a rule (models read shapes a lot).
    shape = property(lambda self: self._shape)  # type: ignore[assignment]
    dtype = property(lambda self: self.local_or_recipe.dtype)  # type: ignore[assignment]
    device = property(lambda self: self.local_or_recipe.device)  # type: ignore[assignment]
    ndim = property(lambda self: len(self._shape))  # type: ignore[assignment]
    group = property(lambda self: self.region.comm.group)
    rows = property(lambda self: self.row_layout)  # the former name

    comm = property(attrgetter("region.comm"))
    rank = property(attrgetter("region.comm.rank"))
    world_size = property(attrgetter("region.comm.size"))

    @property
    def own_interval(self) -> Interval:
        """The global rows that this rank owns."""
        return self.row_layout.interval(self.region.comm.rank)

    @property
    def local_or_recipe(self) -> Tensor | Recipe:
        """This rank's rows, or what is known of them before they are computed."""
        held: dict[str, Any] = self.__dict__
        return held["local"] if "local" in held else held["recipe"]

    @property
    def is_deferred(self) -> bool:
        """Whether the rows are not computed yet."""
        return "local" not in self.__dict__ and self.__dict__["recipe"].value is None

    def materialize(self) -> Tensor:
        """The rows, computed now where they were not yet."""
        return self.local

    @property
    def as_recipe(self) -> Recipe:
        """What others are made of: the recipe of the rows, or the rows."""
        held: dict[str, Any] = self.__dict__
        recipe: Recipe | None = held.get("recipe")
        if recipe is None or ("local" in held and recipe.value is not held["local"]):
            recipe = self.recipe = Recipe.of(held["local"], self.row_layout.dim)
        return recipe

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return RULES.dispatcher.on_rows(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return below_the_table(func, args)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        if self.region.inner is not None or self.region.level:
            raise UnsupportedOpError(
                f"a tensor of shape {tuple(self.shape)} is sharded along several dims, and cannot enter what "
                "torch.compile compiles: shard along one dim, or leave this module as it is (torch.compiler.disable)"
            )
        return ["local"], (self.row_layout, self.region.lasting, self.local.stride())

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, strides: Any) -> PatchTensor:
        layout, region, _ = context
        return PatchTensor(inner["local"], layout, region)

    @classmethod
    def __metadata_guard__(
        cls,
        known: tuple[RowLayout, Region, memory_format.Strides],
        given: tuple[RowLayout, Region, memory_format.Strides],
    ) -> bool:
        """Of an input of a compiled graph: the wrapper's own strides, which are guarded too, are not its rows'."""
        return known[0] == given[0] and known[1].alike(given[1]) and known[2] == given[2]

    def _stable_hash_for_caching(self) -> str:
        raise UnsupportedOpError("what the rules make of a sharded tensor is not cached beyond this process")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        rows = self.row_layout
        where = f"parts={rows.parts}" if isinstance(rows, BlockLayout) else f"bounds={rows.bounds}"
        return (
            f"PatchTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"dim={rows.dim}, {where}, rank={self.region.comm.rank})"
        )

    def __create_write_items__(self, name: str, _: Any) -> list[Any]:
        return sharded_checkpoint.write_items(name, list(axes_in(self)))

    def __create_chunk_list__(self) -> list[Any]:
        return sharded_checkpoint.chunks_of(list(axes_in(self)))

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return sharded_checkpoint.rows_at(list(axes_in(self)), index.offset)

    def __copy__(self) -> PatchTensor:
        """The same rows outside the autograd graph, as ``copy.copy`` makes of a plain tensor."""
        return PatchTensor(copy.copy(self.local), self.row_layout, self.region)

    @classmethod
    def from_local(
        cls, local: Tensor, group: Mesh, *, dim: Dims = -2, bounds: Sequence[Any] | None = None
    ) -> PatchTensor:
        """Adopt rows that are already distributed, without a copy.

        ``local``: this rank's rows, for example (B, C, h, W); ``bounds``: rank r owns global rows
        ``bounds[r]:bounds[r + 1]``. Without bounds the ranks tell each other their row counts. ``dim``: one, or one for
        each axis of a mesh; then ``bounds`` are one for each, too. Raises ``LayoutError`` where the rows do not fit the
        bounds, ``RankError`` where the other dims differ.
        """
        dim = dims_of(dim)
        one = isinstance(dim, int)
        dims = (dim,) if isinstance(dim, int) else dim
        bounds = [bounds] if one and bounds is not None else bounds
        comms = axes_of(group, dims, local.device)
        places = _places(local, dims, bounds)
        if bounds is None:
            others = [size for d, size in enumerate(local.shape) if d not in places]
            bounds = bounds_held(Ranks(comms), [local.shape[d] for d in places], f"{places} {others} {local.dtype}")
        layouts = [_layout(comm, d, b, None) for comm, d, b in zip(comms, places, bounds, strict=True)]
        for comm, layout in zip(comms, layouts):
            lo, hi = layout.interval(comm.rank)
            if local.shape[layout.dim] != hi - lo:
                raise LayoutError(
                    f"from_local: rank {comm.rank} owns rows {lo}:{hi} by its bounds {layout.bounds}, but its tensor "
                    f"of shape {tuple(local.shape)} has {local.shape[layout.dim]} rows along dim {layout.dim}"
                )
        return _adopted(local, layouts, Region(comms[0]) if one else nested(comms, dims, default()))


def _adopted(local: Tensor, layouts: Sequence[RowLayout], region: Region | None) -> PatchTensor:
    """Rows that are sharded along several dims: the last one is the region's."""
    assert region is not None
    *others, last = layouts
    return PatchTensor(_adopted(local, others, region.inner) if others else local, last, region)


class BlockTensor(PatchTensor):
    """A tensor whose layout is a ``BlockLayout``: only rules that treat all rows alike see it as it is."""

    row_layout: BlockLayout

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return RULES.dispatcher.on_blocks(func, args, kwargs or {})


class LeftTensor(PatchTensor):
    """What others still held of a converted model's activations when the model was restored."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in LEFT:
            return RULES[func].rule(func, *args, **kwargs or {})
        x = next(t for t in tensors_in((args, kwargs)) if isinstance(t, LeftTensor))
        raise DistPatchError(
            f"{op_name(func)} met a tensor of shape {tuple(x.shape)} (sharded; rank {x.region.comm.rank}). "
            "It was made by a converted model that was restored since, and kept by something outside of that model (a "
            "hook, a cache). Drop it, or make it plain, on all ranks: distpatch.gather(x)."
        )


LEFT = frozenset(
    getattr(torch.Tensor, name)
    for name in "size dim numel __len__ __hash__ __repr__ __format__ is_floating_point".split()
)


class PatchCopy(PatchTensor):
    """What is a view on one device, but whose rows had to move: a copy that knows where it came from.

    What is written to it is written to its source too, or refused (rules/core/aliasing.py). ``plain``: the same
    rows without this knowledge.
    """

    plain: PatchTensor
    origin: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return RULES.dispatcher.on_copies(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names, known = super().__tensor_flatten__()
        return names, (*known, self.origin.outside())

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, strides: Any) -> PatchCopy:
        layout, region, _, origin = context
        copy = PatchCopy(inner["local"], layout, region)
        copy.plain, copy.origin = PatchTensor(inner["local"], layout, region), origin
        return copy


def shard(tensor: Tensor, group: Mesh, *, dim: Dims = -2, bounds: Sequence[Any] | None = None) -> PatchTensor:
    """Shard a replicated tensor: a slice, no communication.

    ``tensor``: the same full value on every rank, for example (B, C, H, W). ``dim``: one, or one for each axis of a
    mesh; then ``bounds`` are one for each, too. Returns a PatchTensor of the same (global) shape. Raises
    ``LayoutError`` for dims or bounds that do not fit it.
    """
    dim = dims_of(dim)
    if not isinstance(dim, int):
        comms = axes_of(group, dim, tensor.device)
        return shard_over(nested(comms, dim, default()), tensor, dim, bounds)
    if isinstance(group, (tuple, list)):
        (group,) = axes_of(group, (dim,), tensor.device)
    comm = communicator(group, tensor.device)  # type: ignore[arg-type]  # no sequence
    dim = check_dim(tensor, dim)
    layout = _layout(comm, dim, bounds, tensor.shape[dim])
    return shard_in(Region(comm), tensor, layout)


def shard_in(region: Region, tensor: Tensor, layout: RowLayout) -> PatchTensor:
    if private.forward_mode_level() >= 0:
        refuse_forward_mode("shard")
    comm = region.comm
    if type(tensor) is not Tensor:
        if (kind := kind_of(tensor)) is not None:
            region = replace(region, kind=kind)
        tensor = plain(tensor)
    result = PatchTensor(collectives.shard_rows(tensor, layout, comm.rank, comm.name), layout, region)
    if layout.is_tiny and not torch.compiler.is_compiling():
        result.strides = tensor.stride()
    return result


def nested(comms: Sequence[Communicator], dims: Sequence[int], options: Options, conversion: object = None) -> Region:
    """The region of tensors that are sharded along several dims, each over an axis; the last one is the outermost.

    So what is computed in patches, or later, are rows of the first dim, which stand closest together in memory.
    """
    region = None
    for at, (comm, dim) in enumerate(zip(comms, dims, strict=True)):
        own = replace(options, dim=dim) if at == 0 else options.of_outer_axis(dim)
        region = Region(comm, own, conversion=conversion, inner=region, level=len(dims) - 1 - at)
    assert region is not None
    return region


def shard_over(region: Region, tensor: Tensor, dims: Sequence[int], bounds: Sequence[Any] | None = None) -> PatchTensor:
    """A replicated tensor sharded along several dims, of which the last one is the region's."""
    places = _places(tensor, dims, bounds)
    *others, last = places
    known = None if bounds is None else bounds[-1]
    layout = _layout(region.comm, last, known or region.bounds(tensor.shape[last]), tensor.shape[last])
    result = shard_in(region, tensor, layout)
    if region.inner is not None:
        result.local = shard_over(region.inner, result.local, others, None if bounds is None else bounds[:-1])
    return result


def _places(tensor: Tensor, dims: Sequence[int], bounds: Sequence[Any] | None) -> list[int]:
    """The dims from the front, one for each axis of a mesh."""
    places = [check_dim(tensor, dim) for dim in dims]
    if len(set(places)) < len(places) or (bounds is not None and len(bounds) != len(places)):
        raise LayoutError(
            f"a tensor of shape {tuple(tensor.shape)} cannot be sharded along dims {tuple(dims)} with bounds {bounds}: "
            "each axis of the mesh has a dim of its own, and bounds of its own"
        )
    return places


def shard_input(tensor: Tensor, dim: Dims, region: Region) -> PatchTensor:
    """An argument sharded along ``dim``, or one that is sharded already, in this region."""
    if isinstance(tensor, PatchTensor):
        local = tensor.local if region.inner is None else shard_input(tensor.local, dim, region.inner)
        return PatchTensor(local, tensor.row_layout, region)
    if not isinstance(dim, int):
        return shard_over(region, tensor, dim)
    dim = check_dim(tensor, dim)
    return shard_in(region, tensor, RowLayout(dim, region.bounds(tensor.shape[dim])))


def gather(tree: Any) -> Any:
    """Every PatchTensor inside ``tree`` (nested lists, dicts, output objects) made plain again.

    Collective: all ranks call it. Each gets the whole value; the backward keeps a rank's own rows.
    """
    return map_tensors(handed_back, tree)


def handed_back(tensor: Tensor) -> Tensor:
    """``gather_replicated``, of the class that it is on one device."""
    kind = tensor.region.kind if isinstance(tensor, PatchTensor) else None
    return whole(tensor) if kind is None else kind.of(whole(tensor))


def whole(tensor: Tensor, op: str = "gather") -> Tensor:
    """The full plain tensor, whichever axes it is sharded over."""
    while isinstance(tensor, PatchTensor):
        tensor = gather_replicated(tensor, op)
    return gather_replicated(tensor)


def axes_in(tensor: Any) -> Iterator[PatchTensor]:
    """A sharded tensor, its rows where these are sharded, and so on; of a plain one nothing."""
    while isinstance(tensor, PatchTensor):
        yield tensor
        tensor = tensor.local


def on_rank0(x: PatchTensor, op: str) -> Tensor | None:
    """The full plain tensor on rank 0 (of each axis) alone, outside the autograd graph.

    No other rank could join its backward.
    """
    rows, comm = x.row_layout, x.region.comm
    needs = tuple(((0, rows.size) if rank == 0 else EMPTY,) for rank in range(comm.size))
    (full,) = fetch_rows(x.local.detach(), rows.dim, rows.bounds, needs, comm.name, op, False)
    if comm.rank > 0:
        return None
    return on_rank0(full, op) if isinstance(full, PatchTensor) else full.contiguous()


def gather_replicated(tensor: Tensor, op: str = "gather") -> Tensor:
    """The full plain tensor of a PatchTensor, as it stands in memory on one device; a plain tensor as it is."""
    if not isinstance(tensor, PatchTensor):
        return tensor.plain if isinstance(tensor, RowCopy) else tensor
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.distpatch.gather(tensor, op)
    order = None
    if tensor.strides is not None:
        order = memory_format.order_by(tensor.shape, tensor.strides)
    elif not tensor.row_layout.is_tiny:
        order = memory_format.memory_order(tensor.local)
    return collectives.gather_rows(tensor.local, tensor.row_layout, tensor.region.comm.name, op, order)


def check_dim(tensor: Tensor, dim: int) -> int:
    """``dim`` counted from the front; LayoutError where the tensor has no such dim."""
    if not -tensor.ndim <= dim < tensor.ndim:
        raise LayoutError(
            f"dim {dim} is out of range for a tensor of shape {tuple(tensor.shape)}; rows are "
            f"sharded along one of its dims {-tensor.ndim}..{tensor.ndim - 1}"
        )
    return dim % tensor.ndim


def _layout(comm: Communicator, dim: int, bounds: Sequence[int] | None, rows: int | None) -> RowLayout:
    if bounds is None:
        assert rows is not None
        bounds = even_bounds(rows, comm.size)
    layout = RowLayout(dim, tuple(bounds))
    if layout.world_size != comm.size or (rows is not None and layout.size != rows):
        raise LayoutError(
            f"bounds {layout.bounds} do not cover {rows} rows on {comm.size} ranks: they must be "
            f"{comm.size + 1} numbers from 0 to the number of rows"
        )
    return layout
