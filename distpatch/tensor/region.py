"""What all tensors of one sharded computation share: the ranks, the options, and what belongs to one call."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from distpatch.comm import backward_failures  # noqa: F401  (it registers what is replaced in torch)
from distpatch.comm.communicator import Communicator
from distpatch.layout.rows import Bounds
from distpatch.layout.shares import shared_bounds
from distpatch.tensor import options
from distpatch.tensor.options import Options
from distpatch.tensor.user_classes import Kind
from distpatch.torch_utils import patches


class _Meshes:
    """``some``: whether tensors of this process may be sharded over several axes."""

    some = False


meshes = _Meshes()


@dataclass(frozen=True, eq=False)
class CallState:
    """What belongs to one call of a converted model.

    ``replicas``: the model's parameters by id, each with the stand-in that meets rows in this call, so that all their
    gradients are summed over ranks together. ``buffers``: ids of the model's buffers, which stay plain tensors
    whatever is written to them.
    """

    replicas: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    buffers: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Region:
    """Who takes part in a sharded computation, and how each rank computes its rows.

    ``warned``: operations without a rule that were warned of. ``call``: of a converted model, under way. ``kind``: of
    which class results are once they are gathered, where a user's own (user_classes.py). ``conversion``: the
    converted model whose call it is, until a result is handed to the caller. ``inner``: of the rows of this one, where
    they are sharded themselves, over another axis of a mesh (axes.py); ``level``: how many axes there are outside.
    """

    comm: Communicator
    options: Options = field(default_factory=options.default)
    warned: set[str] = field(default_factory=set)
    call: CallState = field(default_factory=CallState)
    kind: Kind | None = None
    conversion: object = None
    inner: Region | None = None
    level: int = 0

    def __post_init__(self) -> None:
        patches.install()  # before there are sharded tensors
        if self.inner is not None:
            meshes.some = True

    def bounds(self, rows: int) -> Bounds:
        """Who gets which of so many rows, where nothing else says it."""
        return shared_bounds(rows, self.comm.size, self.options.shares)

    @property
    def lasting(self) -> Region:
        """The region without what belongs to one call: as a compiled graph keeps it."""
        call = self.call
        return replace(self, call=CallState(), kind=None) if call.replicas or call.buffers or self.kind else self

    @property
    def handed_out(self) -> Region:
        """The region of what a caller is given: no longer the model's own."""
        return replace(self, call=CallState(), conversion=None)

    def each(self, **changes: Any) -> Region:
        """The same with changes, and so the regions inside it."""
        return replace(self, **changes, inner=None if self.inner is None else self.inner.each(**changes))

    @property
    def axes(self) -> tuple[Region, ...]:
        """The region and those inside it, from the outermost on."""
        return (self,) if self.inner is None else (self, *self.inner.axes)

    def alike(self, other: Region) -> bool:
        """Whether what was compiled for one serves the other."""
        return self.comm is other.comm and self.options.packed == other.options.packed

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return self
