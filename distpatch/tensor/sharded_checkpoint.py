"""Sharded tensors in ``torch.distributed.checkpoint``: each rank writes and reads its own rows, under any layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distpatch.layout.rows import BlockLayout, RowLayout

if TYPE_CHECKING:
    from distpatch.tensor.patch_tensor import PatchTensor


def _intervals(layout: RowLayout, rank: int) -> Iterator[tuple[int, int, int]]:
    """(first row of the global tensor, first row of the rank's own, how many), of rows that stand together."""
    bounds, blocks = (layout.inner, layout.blocks) if isinstance(layout, BlockLayout) else (layout.bounds, 1)
    lo, hi = bounds[rank], bounds[rank + 1]
    if lo < hi:
        yield from ((block * bounds[-1] + lo, block * (hi - lo), hi - lo) for block in range(blocks))


def chunks_of(x: PatchTensor) -> list[Any]:
    """Where this rank's rows stand in the global tensor (``ChunkStorageMetadata``); of a rank without rows none."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    def at(dim_value: int, others: list[int]) -> torch.Size:
        return torch.Size(dim_value if d == x.row_layout.dim else n for d, n in enumerate(others))

    return [
        ChunkStorageMetadata(offsets=at(start, [0] * x.ndim), sizes=at(count, list(x.shape)))
        for start, _, count in _intervals(x.row_layout, x.rank)
    ]


def write_items(name: str, x: PatchTensor) -> list[Any]:
    """What this rank writes (``WriteItem``)."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    properties = TensorProperties.create_from_tensor(x.local)
    return [
        WriteItem(
            index=MetadataIndex(name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=x.shape),
        )
        for chunk in chunks_of(x)
    ]


def rows_at(x: PatchTensor, offset: torch.Size | None) -> Tensor:
    """The rows that begin there, of this rank's own: to be written to a file, or read into."""
    dim = x.row_layout.dim
    for start, own, count in _intervals(x.row_layout, x.rank):
        if offset is None or offset[dim] == start:
            return x.local.detach().narrow(dim, own, count)
    raise ValueError(f"rank {x.rank} has no rows from {offset} of a tensor of shape {tuple(x.shape)}")
