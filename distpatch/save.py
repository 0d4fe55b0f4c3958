"""Results written to disk by the ranks that hold them: no rank ever has the whole picture or clip.

``.npy`` and TIFF files are mapped into memory, and every rank writes its own rows (all ranks must see one file
system). PNG and video are sequential: rank 0 writes them, and is sent a few rows, or one frame, at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distpatch.comm.communicator import ALONE
from distpatch.comm.meshes import Ranks
from distpatch.comm.together import together
from distpatch.errors import LayoutError
from distpatch.rules.core.redistribution import in_order
from distpatch.tensor.patch_tensor import PatchTensor, axes_in, on_rank0
from distpatch.tensor.sharded_checkpoint import chunks

Range = tuple[float, float]
CHUNK_BYTES = 16 << 20  # of a PNG on its way to rank 0


def to_memmap(x: Tensor, path: str | Path) -> Any:
    """Write a tensor of any shape to a ``.npy`` file, each rank its own rows; returns it mapped, read-only.

    bf16, which numpy does not have, becomes fp32. Every rank of the group calls it, and can read the file when
    it returns. A plain tensor is written by rank 0. Raises ``DistPatchError`` on every rank if one cannot write.
    """
    import numpy as np

    x = x.float() if x.dtype == torch.bfloat16 else x

    def create() -> None:
        dtype = torch.empty(0, dtype=x.dtype).numpy().dtype
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=tuple(x.shape)).flush()

    _write_mapped(x, path, create, lambda: np.load(path, mmap_mode="r+", allow_pickle=False))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def save_image(x: Tensor, path: str | Path, *, value_range: Range | None = (0.0, 1.0), progress: bool = False) -> None:
    """Write a picture as PNG (8 bits) or TIFF (8 bits, or the numbers as they are for ``value_range=None``).

    ``x``: (C, H, W) or (1, C, H, W), C of 1, 3 or 4, sharded or plain; floating values in ``value_range``
    (clamped), or uint8. Every rank of the group calls it. ``progress``: a bar on rank 0. Raises ``LayoutError``
    for another shape, ``DistPatchError`` on every rank if a file cannot be written.
    """
    picture = _without_batch(x, 3, "(C, H, W) or (1, C, H, W)")
    if picture.shape[0] not in {1, 3, 4}:
        raise LayoutError(f"save_image: a picture has 1, 3 or 4 channels; got a tensor of shape {tuple(x.shape)}")
    if Path(path).suffix.lower() in {".tif", ".tiff"}:
        _save_tiff(picture, path, value_range)
    elif Path(path).suffix.lower() == ".png":
        _save_png(picture, path, value_range or (0.0, 255.0), progress)
    else:
        raise ValueError(f"save_image writes .png, .tif and .tiff; got {path}")


def save_video(
    x: Tensor | Iterable[Tensor],
    path: str | Path,
    *,
    fps: float = 24,
    value_range: Range = (0.0, 1.0),
    codec: str = "libx264",
    pixel_format: str | None = None,
    options: dict[str, str] | None = None,
    progress: bool = False,
) -> None:
    """Write a clip, of which rank 0 is sent one frame at a time, with PyAV.

    ``x``: (C, T, H, W) or (1, C, T, H, W), C = 3, sharded or plain; floating values in ``value_range``
    (clamped), or uint8. Or an iterable of such clips that follow each other, such as ``VideoStream.frames``: rank 0
    writes the frames of one, which it has as bytes, while the next is computed; what the iterable raises is raised,
    after the frames before it were written. ``codec``, ``pixel_format`` and ``options`` are FFmpeg's
    (``options={"crf": "18"}``); yuv420p where height and width are even, else yuv444p. Every rank of the group calls
    it. Raises as ``save_image``.
    """
    file = _VideoFile(path, fps, codec, pixel_format, options or {})
    if not isinstance(x, Tensor):
        return _write_clips(x, file, value_range, progress)
    clip = _frames_first(x)

    def encode(arrays: Iterable[Any]) -> None:
        try:
            file.write(arrays)
        finally:
            file.close()

    _stream(clip, _pieces(clip, value_range), len(clip), encode, path, progress)


def _frames_first(x: Tensor) -> Tensor:
    clip = _without_batch(x, 4, "(C, T, H, W) or (1, C, T, H, W)")
    if clip.shape[0] != 3:
        raise LayoutError(f"save_video: a frame has 3 channels; got a tensor of shape {tuple(x.shape)}")
    return clip.movedim(1, 0)


def _pieces(clip: Tensor, value_range: Range) -> Iterator[Tensor]:
    return (_to_bytes(clip[t], value_range) for t in range(len(clip)))


class _VideoFile:
    """A video that is written frame by frame, on one rank; opened with the first one."""

    def __init__(
        self, path: str | Path, fps: float, codec: str, pixel_format: str | None, options: dict[str, str]
    ) -> None:
        self.path, self.fps, self.codec, self.pixel_format, self.options = path, fps, codec, pixel_format, options
        self._file: Any = None
        self._stream: Any = None

    def write(self, arrays: Iterable[Any]) -> None:
        """Frames (H, W, 3) of bytes, all of one size."""
        import av

        for array in arrays:
            if self._file is None:
                self._open(*array.shape[:2])
            self._file.mux(self._stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))

    def _open(self, height: int, width: int) -> None:
        import av

        self._file = av.open(str(self.path), "w")
        rate = Fraction(self.fps).limit_denominator(1001)
        self._stream = self._file.add_stream(self.codec, rate=rate, options=self.options)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = self.pixel_format or ("yuv444p" if height % 2 or width % 2 else "yuv420p")
        self._file.start_encoding()  # a file that cannot be made is known now, and not once frames come out

    def close(self) -> None:
        """What the encoder holds back is written, too."""
        file, self._file = self._file, None
        if file is not None:
            with file:
                file.mux(self._stream.encode())


def _write_clips(clips: Iterable[Tensor], file: _VideoFile, value_range: Range, progress: bool) -> None:
    """Clips that follow each other: a thread of rank 0 writes one while the next is computed.

    The ranks meet after each, so that a file that cannot be written is an error on all of them one clip later.
    """
    clip: Tensor | None = None
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1, "distpatch-video") as thread, ExitStack() as ending:
        ending.callback(thread.submit, file.close)  # after what was submitted before, also where something fails
        shown = ending.enter_context(_frames_shown(file.path, progress))
        for x in clips:
            last, clip = clip, _frames_first(x)
            if last is not None and last.shape[-2:] != clip.shape[-2:]:
                raise LayoutError(f"save_video: frames of {tuple(clip.shape[-2:])} follow {tuple(last.shape[-2:])}")
            ranks, leads = _writers(clip)
            arrays = list(_arrays(_pieces(clip, value_range), ranks, file.path))
            _together(ranks, None if writing is None else writing.result, clip, file.path)
            if leads:
                writing = thread.submit(file.write, arrays)
                shown(len(arrays))
        if clip is None:
            raise LayoutError("save_video: an iterable without clips")
        last_of = None if writing is None else partial(_finish, writing, thread.submit(file.close))
        _together(ranks, last_of, clip, file.path)


def _finish(*work: Future[None]) -> None:
    for each in work:
        each.result()


@contextmanager
def _frames_shown(path: Any, progress: bool) -> Iterator[Callable[[int], object]]:
    """A bar of frames, where it is asked for: what is yielded is told how many more there are."""
    if not progress:
        yield lambda more: None
        return
    from tqdm import tqdm

    with tqdm(desc=str(path), unit="frame", leave=False, disable=None) as bar:
        yield bar.update


def _save_png(x: Tensor, path: str | Path, value_range: Range, progress: bool) -> None:
    channels, height, width = x.shape
    step = max(CHUNK_BYTES // (channels * width), 1)
    pieces = (_to_bytes(x[:, lo : lo + step], value_range) for lo in range(0, height, step))

    def encode(arrays: Iterable[Any]) -> None:
        import png

        writer = png.Writer(width, height, greyscale=channels == 1, alpha=channels == 4, bitdepth=8)
        with open(path, "wb") as file:
            writer.write(file, (row.reshape(-1) for array in arrays for row in array))

    _stream(x, pieces, -(-height // step), encode, path, progress)


def _save_tiff(x: Tensor, path: str | Path, value_range: Range | None) -> None:
    import tifffile

    pixels = x if value_range is None else _to_bytes(x, value_range)
    pixels = pixels.movedim(0, -1)
    pixels = pixels.float() if pixels.dtype == torch.bfloat16 else pixels

    def create() -> None:
        dtype = torch.empty(0, dtype=pixels.dtype).numpy().dtype
        kind = "minisblack" if x.shape[0] == 1 else "rgb"
        shape = tuple(pixels.shape if x.shape[0] > 1 else pixels.shape[:2])
        tifffile.memmap(path, shape=shape, dtype=dtype, photometric=kind).flush()

    def reopen() -> Any:
        return tifffile.memmap(path, mode="r+").reshape(tuple(pixels.shape))

    _write_mapped(pixels, path, create, reopen)


def _without_batch(x: Tensor, ndim: int, shapes: str) -> Tensor:
    if x.ndim == ndim + 1 and x.shape[0] == 1:
        x = x[0]
    if x.ndim != ndim:
        raise LayoutError(f"expected {shapes}, got a tensor of shape {tuple(x.shape)}: save one of a batch at a time")
    return x.detach()


def _to_bytes(x: Tensor, value_range: Range) -> Tensor:
    if x.dtype == torch.uint8:
        return x
    lo, hi = value_range
    return ((x.float() - lo) * (255 / (hi - lo))).round().clamp(0, 255).to(torch.uint8)


def _writers(x: Tensor) -> tuple[Ranks, bool]:
    """The ranks that write, and whether this one leads them."""
    if isinstance(x, PatchTensor):
        if x.region.level:
            raise LayoutError(
                f"a tensor of shape {tuple(x.shape)} is sharded over one axis of a mesh, and all ranks of the others "
                "have the same of it, which would write to one file: gather it first (distpatch.gather)"
            )
        axes = [region.comm for region in x.region.axes]  # also those over which it is the same
        return Ranks(axes[::-1]), all(comm.rank == 0 for comm in axes)
    return Ranks([ALONE]), not dist.is_initialized() or dist.get_rank() == 0


def _write_mapped(x: Tensor, path: str | Path, create: Callable[[], None], reopen: Callable[[], Any]) -> None:
    """Rank 0 makes the file, then every rank writes its rows into it."""
    x = in_order(x)
    ranks, leads = _writers(x)
    _together(ranks, create if leads else None, x, path)

    def write() -> None:
        target = reopen()
        if isinstance(x, PatchTensor):
            for part in chunks(list(axes_in(x))):
                target[part.place] = part.values.cpu().numpy()
        else:
            target[...] = x.detach().cpu().numpy()
        target.flush()

    _together(ranks, write if leads or isinstance(x, PatchTensor) else None, x, path)


def _stream(
    x: Tensor, pieces: Iterator[Tensor], count: int, encode: Callable[[Iterable[Any]], None], path: Any, progress: bool
) -> None:
    """``encode`` on rank 0 of the pieces (C, H, W) as arrays (H, W, C), one at a time.

    After a failure the remaining pieces are still received, and dropped, so that no rank blocks.
    """
    ranks, leads = _writers(x)
    arrays = _arrays(pieces, ranks, path)
    if leads and progress:
        from tqdm import tqdm

        arrays = iter(tqdm(arrays, total=count, desc=str(path), leave=False, disable=None))  # None: on terminals alone

    def write() -> None:
        try:
            encode(arrays)
        finally:
            _drain(arrays)

    _together(ranks, write if leads else partial(_drain, arrays) if ranks.whole.size > 1 else None, x, path)


def _arrays(pieces: Iterator[Tensor], ranks: Ranks, path: Any) -> Iterator[Any]:
    """Each piece on rank 0. What a rank raises here ends what the others wait for; the file's writer may go on."""
    while True:
        with ranks.open_call(f"saving {path}"):
            try:
                array = _at_rank0(next(pieces))
            except StopIteration:
                return
        yield array


def _drain(arrays: Iterator[Any]) -> None:
    for _ in arrays:
        pass


def _at_rank0(piece: Tensor) -> Any:
    if not isinstance(piece, PatchTensor):
        return piece.movedim(0, -1).cpu().numpy()
    whole = on_rank0(piece, "save")
    return None if whole is None else whole.movedim(0, -1).cpu().numpy()


def _together(ranks: Ranks, action: Callable[[], None] | None, x: Tensor, path: Any) -> None:
    """Run this rank's part, then synchronise: an error of one rank is raised on all."""

    def part() -> tuple[None, str]:
        if action is not None:
            action()
        return None, f"{tuple(x.shape)} {x.dtype} {path}"

    together(ranks.whole, "save", part, f"{path} could not be written")
