"""Ranks that stand in a mesh: a group for each axis, over which a dim is sharded, and all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, product
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distpatch.comm.communicator import Communicator, Group, communicator
from distpatch.comm.rendezvous import Payload
from distpatch.errors import LayoutError, RankError
from distpatch.layout.rows import Bounds

Mesh: TypeAlias = "Group | Sequence[Group]"  # a DeviceMesh of several axes, or a group an axis
Dims: TypeAlias = "int | tuple[int, ...]"


def dims_of(dim: object) -> Dims:
    """A dim, or several different ones; one in a tuple is itself. Raises ``ValueError`` for anything else."""
    if isinstance(dim, int):
        return dim
    if not isinstance(dim, (tuple, list)) or not dim or not all(isinstance(one, int) for one in dim):
        raise ValueError(f"dim is a number, or several of them, one an axis of the mesh; got {dim!r}")
    if len(set(dim)) < len(dim):
        raise ValueError(f"dim names a dim once for each axis of the mesh; got {dim!r}")
    return dim[0] if len(dim) == 1 else tuple(dim)


def axes_of(mesh: Mesh, dims: Sequence[int], device: torch.device | None = None) -> list[Communicator]:
    """The communicator of each axis, connected; every rank of the mesh calls it the first time.

    Raises ``LayoutError`` where there are not as many axes as dims, ``RankError`` for a rank that is no member.
    """
    if isinstance(mesh, DeviceMesh):
        if mesh.get_coordinate() is None:
            raise RankError(f"global rank {dist.get_rank()} is not a member of the mesh {mesh}")
        groups: list[Group] = [mesh.get_group(axis) for axis in range(mesh.ndim)]
    elif isinstance(mesh, (tuple, list)):
        groups = list(mesh)
    else:
        groups = [mesh]  # type: ignore[list-item]
    if len(groups) != len(dims):
        raise LayoutError(
            f"dims {tuple(dims)} are sharded over one axis of a mesh each; got {len(groups)} "
            f"{'axis' if len(groups) == 1 else 'axes'}: {mesh}"
        )
    return [communicator(group, device) for group in groups]


class Ranks:
    """All ranks that take part in the calls of a model; in a mesh, those of every axis.

    ``whole``: the communicator of all, where they compare calls; of one axis it is that axis's own. ``axes``: over
    which rows move.
    """

    def __init__(self, axes: Sequence[Communicator]) -> None:
        self.axes = tuple(axes)
        self.whole = axes[0] if len(axes) == 1 else _whole(axes)
        self._others = () if len(axes) == 1 else self.axes

    @property
    def closed(self) -> bool:
        return any(comm.closed for comm in (self.whole, *self._others))

    def wait_at_most(self, liveness: float | None, late_check: bool) -> None:
        """See ``Communicator.liveness``, ``Communicator.late_check``; in a mesh each call is known to be whole."""
        for comm in (self.whole, *self._others):
            comm.liveness, comm.late_check = liveness, late_check and not self._others

    def begin_call(
        self, what: str, signature: str | Callable[[], str], payload: Payload | None = None
    ) -> list[Payload]:
        """Meet all ranks (``Communicator.begin_call``); where an axis has failed, all of them are connected anew."""
        if not self._others:
            return self.whole.begin_call(what, signature, payload)
        if any(comm.closed and comm.name for comm in self._others):
            raise RankError(f"{what}: a process group of the mesh is closed (this is rank {self.whole.rank})")
        mine = {
            "axis broken": any(comm.broken for comm in self._others),
            "parts": [comm.parts for comm in self._others],
        }
        answers = self.whole.begin_call(what, signature, {**mine, **(payload or {})})
        failed = any(answer["axis broken"] or answer["broken"] for answer in answers)
        for comm in self._others:
            comm.parts = 0
        if any(answer["axis broken"] for answer in answers):
            for comm in self._others:
                comm.give_up()
                comm.connect()
        elif not failed:
            self._compare_parts(what, [answer["parts"] for answer in answers])
        return answers

    def _compare_parts(self, what: str, seen: Sequence[Any]) -> None:
        """Raise on all ranks where those of one axis sent parts in the last call that do not fit each other."""
        axis = axis_of_other_parts([comm.size for comm in self.axes], seen)
        if axis is not None:
            raise RankError(
                f"{what}: in the call before it the ranks of axis {axis} of the mesh had different parts of one "
                f"tensor, and sent what does not fit: its result is wrong (this is rank {self.whole.rank}). It is "
                "a fault of distpatch, please report it; along one dim alone the model is computed right."
            )

    @contextmanager
    def open_call(self, what: str) -> Iterator[None]:
        """As ``Communicator.open_call``, on every axis; an error of an axis names the rank among all of them."""
        with ExitStack() as opened:
            for comm in (*self._others, self.whole):  # the last one tells first who has failed
                opened.enter_context(comm.open_call(what))
            try:
                yield
            except RankError as error:
                note = self.whole.failure if self._others else None
                if note is None:
                    raise
                raise RankError(
                    f"{what}: {note} (of the {self.whole.size} ranks of the mesh; this is rank {self.whole.rank})"
                ) from error


def bounds_held(ranks: Ranks, rows: Sequence[int], signature: str) -> list[Bounds]:
    """Bounds along each axis, of how many rows each rank holds along each; every rank calls it.

    Raises ``RankError`` where the signatures differ, ``LayoutError`` on all ranks where those at one place of an axis
    hold different numbers of rows.
    """
    answers = ranks.whole.rendezvous.require_same_call("from_local", signature, {"rows": list(rows)})
    held: list[list[int]] = [answer["rows"] for answer in answers]  # type: ignore[misc]
    found = []
    places = list(product(*(range(comm.size) for comm in ranks.axes)))
    for axis, comm in enumerate(ranks.axes):
        heights: list[int] = []
        for place in range(comm.size):
            seen = {counts[axis] for counts, at in zip(held, places, strict=True) if at[axis] == place}
            if len(seen) > 1:
                raise LayoutError(
                    f"from_local: the ranks at place {place} of axis {axis} of the mesh hold {sorted(seen)} rows along "
                    "its dim: each must hold as many as the others"
                )
            heights += seen
        found.append((0, *accumulate(heights)))
    return found


# Of all ranks, by the names of the axes' connections, as long as the first axis is known: on all ranks alike.
_meshes: weakref.WeakKeyDictionary[Communicator, dict[str, Communicator]] = weakref.WeakKeyDictionary()


def _whole(axes: Sequence[Communicator]) -> Communicator:
    """The communicator of all ranks of a mesh, in its order; every rank calls it."""
    key = " | ".join(comm.name for comm in axes)
    of_axis = _meshes.setdefault(axes[0], {})
    known = of_axis.get(key)
    if known is not None and not known.closed:
        return known
    of_axis[key] = whole = axes[0].of_mesh(axes[1:])
    return whole


def axis_of_other_parts(mesh: Sequence[int], seen: Sequence[Sequence[int]]) -> int | None:
    """The first axis whose ranks have not all sent parts of the same tensors, by each rank's checksums."""
    for axis in range(len(mesh)):
        lines: dict[tuple[int, ...], set[int]] = {}
        for place, parts in zip(product(*map(range, mesh)), seen, strict=True):
            lines.setdefault((*place[:axis], *place[axis + 1 :]), set()).add(parts[axis])
        if any(len(found) > 1 for found in lines.values()):
            return axis
    return None
