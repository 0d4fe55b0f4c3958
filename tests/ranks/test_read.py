"""Arrays read from files by the ranks that own their rows: every kind of file, layout and failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

import distpatch
from distpatch import DistPatchError, LayoutError, LocalRows, RankError, ShardedDataset
from tests.support.oracle import random_tensor
from tests.support.threads import rank_outcomes, run_ranks

WORLDS = (1, 2, 3, 4)
SCAN = random_tensor((7, 5, 6)).numpy().astype("float32")


def as_npy(path: Path) -> Any:
    np.save(path / "scan.npy", SCAN)
    return path / "scan.npy"


def as_fortran_npy(path: Path) -> Any:
    np.save(path / "scan.npy", np.asfortranarray(SCAN.astype(">f4")))
    return str(path / "scan.npy")


def as_tiff(path: Path) -> Any:
    import tifffile

    tifffile.imwrite(path / "scan.tif", SCAN)
    return path / "scan.tif"


def as_zarr(path: Path) -> Any:
    import zarr

    array = zarr.create_array(str(path / "scan.zarr"), shape=SCAN.shape, chunks=(2, 2, 6), dtype="float32")
    array[...] = SCAN
    return path / "scan.zarr"


def as_hdf5(path: Path) -> Any:
    import h5py

    with h5py.File(path / "scan.h5", "w") as file:
        file["scan"] = SCAN
    return lambda: h5py.File(path / "scan.h5", "r")["scan"]


def as_netcdf(path: Path) -> Any:
    import xarray

    scan = xarray.DataArray(SCAN, dims=("time", "lat", "lon"), name="scan")
    scan.to_dataset().to_netcdf(path / "scan.nc", engine="scipy", format="NETCDF3_64BIT")  # big-endian
    return lambda: xarray.open_dataset(path / "scan.nc", engine="scipy")["scan"]


def as_tensor(path: Path) -> Any:
    return torch.from_numpy(SCAN)


KINDS = [as_npy, as_fortran_npy, as_tiff, as_zarr, as_hdf5, as_netcdf, as_tensor]


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind: Any, tmp_path: Path) -> None:
    source, whole = kind(tmp_path), torch.from_numpy(SCAN)[None]
    for world in WORLDS:
        for dim in (0, 1, -1):

            def body(rank: int, dim: int = dim) -> tuple[torch.Tensor, torch.Tensor]:
                x = distpatch.read_shard(source, dist.group.WORLD, dim=dim, pattern="d h w -> 1 d h w")
                assert x.dtype == torch.float32 and x.local.is_contiguous() and x.row_layout.dim == dim % 3 + 1
                return distpatch.gather(x), distpatch.gather(F.avg_pool3d(x, 3, 1, 1))

            for read, pooled in run_ranks(world, body):
                assert torch.equal(read, whole)
                assert torch.allclose(pooled, F.avg_pool3d(whole, 3, 1, 1))


class Watched:
    """An array that knows what was read of it."""

    def __init__(self) -> None:
        self.shape, self.read = SCAN.shape, []  # type: tuple[int, ...], list[slice]

    def __getitem__(self, index: tuple[slice, ...]) -> Any:
        self.read.append(index[-1])
        return SCAN[index]


@pytest.mark.parametrize(("world", "bounds"), [(3, None), (3, (0, 1, 1, 7)), (9, None)], ids=str)
def test_each_row_is_read_once(world: int, bounds: tuple[int, ...] | None) -> None:
    def body(rank: int) -> tuple[list[slice], torch.Tensor]:
        array = Watched()
        x = distpatch.read_shard(array, dist.group.WORLD, dim=0, bounds=bounds, dtype=torch.float64)
        y = F.conv2d(x[None].transpose(0, 1), torch.ones(1, 1, 3, 3, dtype=torch.float64), padding=1)
        assert x.dtype == torch.float64
        return array.read, distpatch.gather(y)

    outcomes = run_ranks(world, body)
    rows = [row for read, _ in outcomes for part in read for row in range(part.start, part.stop)]
    assert rows == list(range(7)) and all(len(read) == 1 for read, _ in outcomes)
    whole = torch.from_numpy(SCAN).double()[:, None]
    assert torch.allclose(outcomes[0][1], F.conv2d(whole, torch.ones(1, 1, 3, 3, dtype=torch.float64), padding=1))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"dim": 3}, "dim 3 is no dim"),
    ({"bounds": (0, 7)}, "do not share out"),
    ({"bounds": (0, 5, 3, 5)}, "do not share out"),
    ({"pattern": "d h w"}, "names each"),
    ({"pattern": "d (h w) -> d h w"}, "names each"),
    ({"pattern": "d h w -> d w", "dim": 1}, "leaves out the dim 'h'"),
    ({"source": 3}, "a source is an array"),
    ({"source": "scan.jpg"}, "opens .npy"),
    ({"source": "missing.npy"}, "rank 0: FileNotFoundError.*rank 2: FileNotFoundError"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=str)
def test_what_cannot_be_read(given: dict[str, Any], message: str) -> None:
    arguments = {"source": SCAN, **given}
    for error in rank_outcomes(3, lambda rank: distpatch.read_shard(group=dist.group.WORLD, **arguments)):
        assert isinstance(error, DistPatchError)
        with pytest.raises(DistPatchError, match=message):
            raise error


def test_what_one_rank_cannot_read() -> None:
    """All ranks learn it, and may go on; so they do of one that has another array."""

    def body(rank: int) -> float:
        with pytest.raises(DistPatchError, match=r"rank 1: OSError: gone"):
            distpatch.read_shard(SCAN if rank != 1 else lambda: gone(), dist.group.WORLD)
        with pytest.raises(RankError, match=r"rank 1: \[7, 4\], rows \(0, 2, 4, 5\)"):
            distpatch.read_shard(SCAN if rank != 1 else SCAN[:, :, :4], dist.group.WORLD)
        return float(distpatch.read_shard(SCAN, dist.group.WORLD).sum())

    assert run_ranks(3, body)[2] == pytest.approx(float(SCAN.sum()), rel=1e-5)


def gone() -> Any:
    raise OSError("gone")


class Sample(NamedTuple):
    scan: Any
    mask: Any


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (3, 0), (2, 1)])
def test_dataset(world: int, workers: int, tmp_path: Path) -> None:
    """Batches of samples, a worker process reading the rows of a rank that is no member of it."""
    scans = [SCAN + i for i in range(5)]
    for i, scan in enumerate(scans):
        np.save(tmp_path / f"{i}.npy", scan)
        np.save(tmp_path / f"{i}-mask.npy", (scan > 0).astype("uint8"))
    sources = [Sample(tmp_path / f"{i}.npy", tmp_path / f"{i}-mask.npy") for i in range(5)]

    def body(rank: int) -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
        data = ShardedDataset(sources, dist.group.WORLD, dim=1, pattern="d h w -> 1 d h w", transform=noted)
        found = []
        context = "spawn" if workers else None  # ranks are threads here, and a process that is forked has one of them
        loader = DataLoader(
            data, batch_size=2, num_workers=workers, collate_fn=data.collate, multiprocessing_context=context
        )
        for batch in loader:
            assert isinstance(batch["sample"], Sample)
            scan, mask = (part.shard(dist.group.WORLD) for part in batch["sample"])
            found.append((distpatch.gather(scan), distpatch.gather(mask), batch["rows"]))
        return found

    for rank, batches in enumerate(run_ranks(world, body)):
        assert [len(scan) for scan, *_ in batches] == [2, 2, 1]
        whole = torch.cat([scan for scan, *_ in batches])
        assert torch.equal(whole[:, 0], torch.from_numpy(np.stack(scans)))
        assert torch.equal(torch.cat([mask for _, mask, _ in batches]), (whole > 0).to(torch.uint8))
        assert batches[0][2].tolist() == [[5], [3, 2], [2, 2, 1]][world - 1][rank : rank + 1] * 2


def noted(sample: Sample) -> dict[str, Any]:
    return {"sample": sample, "rows": sample.scan.rows.shape[2]}


def test_batches() -> None:
    def body(rank: int) -> None:
        images = ShardedDataset([SCAN, SCAN[:, :4]], dist.group.WORLD)
        one, other = images[0], images[1]
        stacked = images.collate([one, one])
        assert stacked.rows.shape == (2, *one.rows.shape) and stacked.dim == 2
        assert stacked.shard(dist.group.WORLD).shape == (2, 7, 5, 6)
        assert stacked.to(torch.float64).rows.dtype == torch.float64
        with pytest.raises(LayoutError, match="the same rows"):
            images.collate([one, other])
        with pytest.raises(LayoutError):
            LocalRows(one.rows[:, :1], 1, (0, 3, 5)).shard(dist.group.WORLD)

    run_ranks(2, body)
