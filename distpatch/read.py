"""Pictures and volumes read from files by the ranks that own their rows: no rank ever has the whole.

A source is any array that is read by slices (a NumPy memory map, a Zarr array, an HDF5 dataset, a variable of a
NetCDF file, a tensor), a path to one, or a function that opens one. Each rank reads its own rows and no others: a halo
is sent by the rank that owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from distpatch.comm.communicator import Communicator, Group, communicator
from distpatch.comm.together import together
from distpatch.errors import LayoutError
from distpatch.layout.rows import Bounds, even_bounds
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.private import tree_map

Source = Any  # an array, a path, or a function that opens one


@dataclass(frozen=True)
class LocalRows:
    """One rank's rows on their way from a loader's worker, which is no member of a group.

    ``rows``: for example (B, C, h, W), the global rows ``bounds[rank]:bounds[rank + 1]`` of dimension ``dim``.
    """

    rows: Tensor
    dim: int
    bounds: Bounds

    def shard(self, group: Group) -> PatchTensor:
        """The tensor of which these are this rank's rows; nothing is sent. ``LayoutError`` if they do not fit."""
        return PatchTensor.from_local(self.rows, group, dim=self.dim, bounds=self.bounds)

    def to(self, *args: Any, **kwargs: Any) -> LocalRows:
        """The rows on another device, or of another dtype: as ``Tensor.to``."""
        return replace(self, rows=self.rows.to(*args, **kwargs))

    def pin_memory(self) -> LocalRows:
        """As a ``DataLoader`` with ``pin_memory=True`` asks."""
        return replace(self, rows=self.rows.pin_memory())


def read_shard(
    source: Source,
    group: Group,
    *,
    dim: int = -2,
    pattern: str | None = None,
    bounds: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> PatchTensor:
    """A PatchTensor of an array, of which each rank reads its own rows.

    >>> slide = distpatch.read_shard("slide.tif", group, dim=0, pattern="h w c -> 1 c h w", dtype=torch.float32)

    ``source``: an array with ``shape`` and slices, a path (``.npy``; ``.tif``, uncompressed; ``.zarr``), or a function
    that opens one, such as ``lambda: h5py.File("scan.h5")["image"]``. ``dim``: of the source, along which its rows are
    shared out; ``pattern``: an einops pattern of single dims, in whose order the tensor has them (None: as the source).
    ``bounds``: rank r reads rows ``bounds[r]:bounds[r + 1]`` (None: evenly). Every rank of the group calls it. Raises
    ``DistPatchError`` on every rank if one cannot read, ``RankError`` where they see different arrays, ``LayoutError``
    (a ``DistPatchError``) for a dim, a pattern or bounds that do not fit.
    """
    comm = communicator(group, None if device is None else torch.device(device))
    plan = _Reading(comm.rank, comm.size, dim, pattern, None if bounds is None else tuple(bounds), dtype)

    def read() -> tuple[LocalRows, str]:
        found = plan.read(source)
        others = [n for d, n in enumerate(found.rows.shape) if d != found.dim]
        return found, f"{others}, rows {found.bounds} of dim {found.dim}, {found.rows.dtype}"

    return together(comm, "read_shard", read, f"{_named(source)} could not be read").to(device=device).shard(group)


class ShardedDataset(Dataset[Any]):
    """Samples of which each rank reads its own rows; for a ``DataLoader``, also one with workers.

    >>> data = ShardedDataset([("scan1.npy", "mask1.npy"), ...], group, pattern="d h w -> 1 d h w")
    >>> for scan, mask in DataLoader(data, batch_size=2, num_workers=4, collate_fn=data.collate):
    ...     scan, mask = scan.shard(group), mask.shard(group)

    ``sources``: a sample each: a source, or a list, tuple or dict of several. Paths and functions are opened by the
    worker, at each sample (give these rather than open files, which are copied whole to a process that is spawned).
    The other arguments as of ``read_shard``; ``transform`` is given a sample, of ``LocalRows``, and returns what takes
    its place. All ranks of the group must ask for the same samples in the same order: give shuffling samplers the same
    seed, and a ``DistributedSampler`` the size of the *data* axis of a mesh and the rank's place on it.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        group: Group,
        *,
        dim: int = -2,
        pattern: str | None = None,
        bounds: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        comm: Communicator = communicator(group, None)
        self.sources, self.transform = sources, transform
        self._reading = _Reading(comm.rank, comm.size, dim, pattern, None if bounds is None else tuple(bounds), dtype)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Any:
        sample = tree_map(self._reading.read, self.sources[index])
        return sample if self.transform is None else self.transform(sample)

    @staticmethod
    def collate(samples: Sequence[Any]) -> Any:
        """A batch: samples stacked in a new first dim."""
        first = samples[0]
        if isinstance(first, LocalRows):
            if len({(s.dim, s.bounds) for s in samples}) > 1:
                seen = ", ".join(str(s.bounds) for s in samples)
                raise LayoutError(f"samples of a batch have the same rows on each rank; got the bounds {seen}")
            return replace(first, rows=torch.stack([s.rows for s in samples]), dim=first.dim + 1)
        if isinstance(first, dict):
            return {key: ShardedDataset.collate([sample[key] for sample in samples]) for key in first}
        if isinstance(first, (list, tuple)):
            parts = [ShardedDataset.collate(each) for each in zip(*samples, strict=True)]
            return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
        return default_collate(list(samples))


@dataclass(frozen=True)
class _Reading:
    """How a rank reads its rows of a source."""

    rank: int
    size: int
    dim: int
    pattern: str | None
    bounds: Bounds | None
    dtype: torch.dtype | None

    def read(self, source: Source) -> LocalRows:
        array = _opened(source)
        shape = tuple(array.shape)
        if not -len(shape) <= self.dim < len(shape):
            raise LayoutError(f"read_shard: dim {self.dim} is no dim of an array of shape {shape}")
        dim = self.dim % len(shape)
        bounds = even_bounds(shape[dim], self.size) if self.bounds is None else self.bounds
        if len(bounds) != self.size + 1 or bounds[0] != 0 or bounds[-1] != shape[dim] or list(bounds) != sorted(bounds):
            raise LayoutError(f"read_shard: bounds {bounds} do not share out {shape[dim]} rows among {self.size} ranks")
        lo, hi = bounds[self.rank], bounds[self.rank + 1]
        rows = _tensor(array[(slice(None),) * dim + (slice(lo, hi),)])
        if self.pattern is not None:
            dim = _dim_after(self.pattern, dim, shape)
            rows = rearrange(rows, self.pattern).contiguous()
        return LocalRows(rows if self.dtype is None else rows.to(self.dtype), dim, bounds)


def _named(source: Source) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    shape = f" of shape {tuple(source.shape)}" if hasattr(source, "shape") else ""
    return f"a source, {getattr(source, '__qualname__', type(source).__qualname__)}{shape},"


def _opened(source: Source) -> Any:
    if isinstance(source, (str, Path)):
        return _open_file(Path(source))
    if callable(source) and not hasattr(source, "shape"):
        return source()
    if not hasattr(source, "shape") or not hasattr(source, "__getitem__"):
        raise TypeError(f"a source is an array, a path, or a function that opens one; got {type(source).__name__}")
    return source


def _open_file(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        import numpy as np

        return np.load(path, mmap_mode="r")
    if suffix in {".tif", ".tiff"}:
        import tifffile

        return tifffile.memmap(path, mode="r")
    if suffix == ".zarr":
        import zarr

        return zarr.open_array(str(path), mode="r")
    raise ValueError(f"read_shard opens .npy, .tif and .zarr; open {path} yourself, and give the array, or a function")


def _tensor(part: Any) -> Tensor:
    """A tensor of its own of a part of an array, in this machine's byte order."""
    if isinstance(part, Tensor):
        return part.clone(memory_format=torch.contiguous_format)
    import numpy as np

    part = np.asarray(part)
    return torch.from_numpy(np.array(part, dtype=part.dtype.newbyteorder("="), order="C"))


def _dim_after(pattern: str, dim: int, shape: tuple[int, ...]) -> int:
    """Where a pattern puts a dim of the source."""
    left, arrow, right = (part.split() for part in pattern.partition("->"))
    if not arrow or len(left) != len(shape) or any(set(name) & set("(.") for name in left + right):
        raise LayoutError(
            f"read_shard: a pattern names each of the {len(shape)} dims of the source by itself, such as "
            f'"h w c -> 1 c h w", because its rows are read in parts; got {pattern!r} for shape {shape}'
        )
    if left[dim] not in right:
        raise LayoutError(f"read_shard: {pattern!r} leaves out the dim {left[dim]!r}, whose rows are shared out")
    return right.index(left[dim])
