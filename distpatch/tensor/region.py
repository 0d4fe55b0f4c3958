"""What all tensors of one sharded computation share: the ranks, and the options of ``convert_model``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from distpatch.comm.communicator import Communicator
from distpatch.tensor.user_classes import Kind


@dataclass(frozen=True, eq=False)
class Region:
    """Who takes part in a sharded computation, and how each rank computes its rows.

    ``splits``, ``sequential``, ``min_numel``, ``workspace_bytes``: how convolutions are cut
    (``convert_model``); ``lazy``: whether rows may be computed later (lazy/recipe.py). ``replicas``: the model's
    parameters by id, each with the stand-in that meets rows in this call, so that all their gradients are
    summed over ranks together. ``buffers``: ids of the model's buffers, which stay plain tensors whatever is
    written to them. ``kind``: of which class results are once they are whole, where a user's own (user_classes.py).
    ``conversion``: the converted model whose call it is, until a result is handed to the caller.
    """

    comm: Communicator
    splits: int | str = 1
    sequential: bool = True
    fallback: str = "warn"
    min_numel: int = 0
    workspace_bytes: int | None = None
    lazy: bool = False
    warned: set[str] = field(default_factory=set)
    replicas: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    buffers: frozenset[int] = frozenset()
    kind: Kind | None = None
    conversion: object = None

    @property
    def lasting(self) -> Region:
        """The region without what belongs to one call: as a compiled graph keeps it."""
        return replace(self, replicas={}, kind=None) if self.replicas or self.kind else self

    @property
    def handed_out(self) -> Region:
        """The region of what a caller is given: no longer the model's own."""
        return replace(self, replicas={}, buffers=frozenset(), conversion=None)

    def alike(self, other: Region) -> bool:
        """Whether what was compiled for one serves the other."""
        return self.comm is other.comm and self.options == other.options

    @property
    def options(self) -> tuple[int | str, bool, str, int, int | None]:
        return self.splits, self.sequential, self.fallback, self.min_numel, self.workspace_bytes

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return self
