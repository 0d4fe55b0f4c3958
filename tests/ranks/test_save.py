"""Files written by all ranks hold what one device would have written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import distpatch
from distpatch import DistPatchError, LayoutError, save
from tests.support.oracle import random_tensor
from tests.support.threads import rank_outcomes, run_ranks

PICTURE = random_tensor((1, 3, 37, 20), dtype=torch.float32).sigmoid()
BYTES = (PICTURE[0] * 255).round().to(torch.uint8).movedim(0, -1).numpy()
CLIP = random_tensor((1, 3, 4, 18, 16), dtype=torch.float32).sigmoid()
WORLDS = (1, 2, 4)


def sharded(tensor: torch.Tensor, dim: int = -2) -> torch.Tensor:
    return distpatch.shard(tensor, dist.group.WORLD, dim=dim)


def read_png(path: Path) -> Any:
    from PIL import Image

    return np.asarray(Image.open(path))


def read_tiff(path: Path) -> Any:
    import tifffile

    return tifffile.imread(path)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("suffix,read", [(".png", read_png), (".tif", read_tiff)])
def test_picture(world: int, suffix: str, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "CHUNK_BYTES", 5 * 3 * 20)
    for dim in (-2, -1):
        path = tmp_path / f"picture{dim}{suffix}"
        run_ranks(world, lambda rank: distpatch.save_image(sharded(PICTURE, dim), path))
        assert np.array_equal(read(path), BYTES)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_and_range(channels: int, tmp_path: Path) -> None:
    picture = random_tensor((channels, 9, 7), dtype=torch.float32)
    expected = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).squeeze(-1).numpy()
    for suffix, read in ((".png", read_png), (".tif", read_tiff)):
        path = tmp_path / f"picture{suffix}"
        run_ranks(2, lambda rank: distpatch.save_image(sharded(picture), path, value_range=(-1, 1)))
        assert np.array_equal(read(path), expected)


def test_tiff_keeps_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    run_ranks(3, lambda rank: distpatch.save_image(sharded(PICTURE), path, value_range=None))
    assert np.array_equal(read_tiff(path), PICTURE[0].movedim(0, -1).numpy())


def test_plain_picture(tmp_path: Path) -> None:
    distpatch.save_image(PICTURE, tmp_path / "alone.png")
    run_ranks(2, lambda rank: distpatch.save_image(PICTURE, tmp_path / "replicated.png"))
    assert np.array_equal(read_png(tmp_path / "alone.png"), BYTES)
    assert np.array_equal(read_png(tmp_path / "replicated.png"), BYTES)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_memmap(world: int, dtype: torch.dtype, tmp_path: Path) -> None:
    clip = (CLIP * 100).to(dtype)
    mapped = run_ranks(world, lambda rank: distpatch.to_memmap(sharded(clip), tmp_path / "clip.npy"))
    for array in mapped:
        assert not array.flags.writeable
        assert torch.equal(torch.from_numpy(np.array(array)).to(dtype), clip)


def test_merged_rows_are_put_in_order(tmp_path: Path) -> None:
    x = random_tensor((2, 8, 5))

    def body(rank: int) -> Any:
        merged = sharded(x).reshape(16, 5)
        return distpatch.to_memmap(merged, tmp_path / "merged.npy")

    assert np.array_equal(run_ranks(2, body)[0], x.reshape(16, 5).numpy())


LOSSLESS: dict[str, Any] = {"codec": "ffv1", "pixel_format": "bgr0", "fps": 12}
FRAMES = (CLIP[0] * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def read_video(path: Path) -> Any:
    import av

    with av.open(str(path)) as file:
        assert file.streams.video[0].average_rate == 12
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@pytest.mark.parametrize("world", WORLDS)
def test_video_of_a_lossless_codec(world: int, tmp_path: Path) -> None:
    """A clip, and the same as clips that follow each other."""
    whole, parts = tmp_path / "clip.mkv", tmp_path / "parts.mkv"

    def body(rank: int) -> None:
        distpatch.save_video(sharded(CLIP), whole, **LOSSLESS)
        distpatch.save_video((sharded(part) for part in CLIP.split([1, 3], 2)), parts, progress=True, **LOSSLESS)

    run_ranks(world, body)
    assert np.array_equal(read_video(whole), FRAMES) and np.array_equal(read_video(parts), FRAMES)


def test_clips_are_written_while_the_next_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has come is written when a later clip fails; what cannot be written ends the clips, on all ranks."""
    path = tmp_path / "clip.mkv"
    written = threading.Event()
    write = save._VideoFile.write

    def told(self: Any, arrays: Any) -> None:
        write(self, arrays)
        written.set()

    def clips(rank: int) -> Iterator[torch.Tensor]:
        yield sharded(CLIP[:, :, :2])
        assert written.wait(30)  # on other ranks too: they are threads
        yield sharded(CLIP[:, :, 2:3])
        raise ArithmeticError("no more")

    monkeypatch.setattr(save._VideoFile, "write", told)
    for error in rank_outcomes(2, lambda rank: distpatch.save_video(clips(rank), path, **LOSSLESS)):
        assert isinstance(error, ArithmeticError)
    assert np.array_equal(read_video(path), FRAMES[:3])
    given: list[int] = []

    def many(rank: int) -> Iterator[torch.Tensor]:
        for _ in range(100):
            given.append(rank)
            yield sharded(CLIP)

    for error in rank_outcomes(2, lambda rank: distpatch.save_video(many(rank), tmp_path / "missing" / "clip.mkv")):
        assert isinstance(error, DistPatchError) and "rank 0: FileNotFoundError" in str(error)
    assert len(given) == 4


def test_video_of_odd_size(tmp_path: Path) -> None:
    import av

    path = tmp_path / "clip.mp4"
    run_ranks(2, lambda rank: distpatch.save_video(sharded(CLIP[..., :17, :15]), path, progress=True))
    with av.open(str(path)) as file:
        assert len(list(file.decode(video=0))) == 4
        assert (file.streams.video[0].height, file.streams.video[0].width) == (17, 15)


def test_rank_0_is_sent_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody ever has more than a frame, or than a few rows of a picture."""
    monkeypatch.setattr(save, "CHUNK_BYTES", 4 * 3 * 20)
    seen: list[int] = []
    fetch = save.on_rank0

    def spy(piece: Any, op: str) -> Any:
        result = fetch(piece, op)
        if result is not None:
            seen.append(result.numel())
        return result

    monkeypatch.setattr(save, "on_rank0", spy)
    run_ranks(2, lambda rank: distpatch.save_image(sharded(PICTURE), tmp_path / "picture.png"))
    assert len(seen) == 10 and max(seen) == 4 * 3 * 20
    seen.clear()
    run_ranks(2, lambda rank: distpatch.save_video(sharded(CLIP), tmp_path / "clip.mp4"))
    assert len(seen) == 4 and max(seen) == 3 * 18 * 16


@pytest.mark.parametrize("name", ["picture.png", "picture.tif", "clip.npy"])
def test_a_file_that_cannot_be_written_is_an_error_on_every_rank(name: str, tmp_path: Path) -> None:
    path = tmp_path / "missing" / name
    write = distpatch.to_memmap if name.endswith("npy") else distpatch.save_image
    for error in rank_outcomes(3, lambda rank: write(sharded(PICTURE), path)):
        assert isinstance(error, DistPatchError) and "rank 0: FileNotFoundError" in str(error)


def test_a_failure_in_the_middle_leaves_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import png

    def write(self: Any, file: Any, rows: Any) -> None:
        next(iter(rows))
        raise OSError("No space left on device")

    monkeypatch.setattr(png.Writer, "write", write)
    monkeypatch.setattr(save, "CHUNK_BYTES", 4 * 3 * 20)

    def body(rank: int) -> float:
        with pytest.raises(DistPatchError, match="rank 0: OSError: No space left on device"):
            distpatch.save_image(sharded(PICTURE), tmp_path / "picture.png")
        return float(sharded(PICTURE).sum())  # and the group can go on

    assert run_ranks(3, body)[2] == pytest.approx(float(PICTURE.sum()), rel=1e-5)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="one of a batch at a time"):
        distpatch.save_image(torch.zeros(2, 3, 4, 4), "x.png")
    with pytest.raises(LayoutError, match="1, 3 or 4 channels"):
        distpatch.save_image(torch.zeros(2, 4, 4), "x.png")
    with pytest.raises(LayoutError, match="3 channels"):
        distpatch.save_video(torch.zeros(1, 2, 4, 4), "x.mp4")
    with pytest.raises(LayoutError, match=r"frames of \(4, 6\) follow \(4, 4\)"):
        distpatch.save_video([torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 4, 6)], tmp_path / "x.mp4")
    with pytest.raises(LayoutError, match="without clips"):
        distpatch.save_video([], tmp_path / "x.mp4")
    with pytest.raises(ValueError, match=r"\.png, \.tif and \.tiff"):
        distpatch.save_image(torch.zeros(3, 4, 4), "x.jpg")
