"""Where a rank's rows stand in the global tensor, under any layout; and ``torch.distributed.checkpoint`` s of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distpatch.layout.rows import RowLayout

if TYPE_CHECKING:
    from distpatch.tensor.patch_tensor import PatchTensor


class Span(NamedTuple):
    """``rows`` that stand together, from row ``start`` of the global tensor and ``own`` of the rank's on."""

    start: int
    own: int
    rows: int


class Chunk(NamedTuple):
    """A part of the global tensor that one rank has; ``values``: a view of its rows."""

    offsets: torch.Size
    values: Tensor

    @property
    def place(self) -> tuple[slice, ...]:
        """As an index of the global tensor."""
        return tuple(slice(at, at + n) for at, n in zip(self.offsets, self.values.shape, strict=True))


def chunks(axes: Sequence[PatchTensor]) -> Iterator[Chunk]:
    """This rank's parts of the global tensor; of a rank without rows none.

    ``axes``: the tensor, its rows where these are sharded over an inner axis, and so on (``axes_in``).
    """
    spans = [[Span(0, 0, n)] for n in axes[0].shape]
    for axis in axes:
        dim = axis.row_layout.dim
        spans[dim] = list(_within(spans[dim], list(_intervals(axis.row_layout, axis.rank))))
    rows = axes[-1].local.detach()
    for parts in product(*spans):
        if all(part.rows for part in parts):
            own = tuple(slice(part.own, part.own + part.rows) for part in parts)
            yield Chunk(torch.Size(part.start for part in parts), rows[own])


def _intervals(layout: RowLayout, rank: int) -> Iterator[Span]:
    own = 0
    for lo, hi in layout.intervals(rank):
        yield Span(lo, own, hi - lo)
        own += hi - lo


def _within(outer: list[Span], inner: list[Span]) -> Iterator[Span]:
    """Of rows that a rank of an outer axis has, those of one of an inner axis."""
    for mine in outer:
        for part in inner:
            lo, hi = max(mine.own, part.start), min(mine.own + mine.rows, part.start + part.rows)
            if lo < hi:
                yield Span(mine.start + lo - mine.own, part.own + lo - part.start, hi - lo)


def chunks_of(axes: Sequence[PatchTensor]) -> list[Any]:
    """Where this rank's rows stand in the global tensor (``ChunkStorageMetadata``)."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return [ChunkStorageMetadata(offsets=part.offsets, sizes=part.values.shape) for part in chunks(axes)]


def write_items(name: str, axes: Sequence[PatchTensor]) -> list[Any]:
    """What this rank writes (``WriteItem``)."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    properties = TensorProperties.create_from_tensor(axes[-1].local)
    return [
        WriteItem(
            index=MetadataIndex(name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=axes[0].shape),
        )
        for chunk in chunks_of(axes)
    ]


def rows_at(axes: Sequence[PatchTensor], offset: torch.Size | None) -> Tensor:
    """The rows that begin there, of this rank's own: to be written to a file, or read into."""
    for part in chunks(axes):
        if offset is None or part.offsets == offset:
            return part.values
    raise ValueError(f"rank {axes[0].rank} has no rows from {offset} of a tensor of shape {tuple(axes[0].shape)}")
