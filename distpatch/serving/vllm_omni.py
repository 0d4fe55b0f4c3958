"""A plug-in of vLLM-Omni: its autoencoders sharded by rows or columns, and its streams of chunks with sharded caches.

``pyproject.toml`` names ``register`` in the entry-point group ``vllm_omni.general_plugins``; vLLM-Omni calls it in each
of its processes. Its interface is that of vLLM-Omni 0.30.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distpatch.diffusion.frame_caches import frame_caches
from distpatch.diffusion.video_stream import VideoStream
from distpatch.errors import DistPatchError
from distpatch.serving.calls import SetAside, ShardedCalls, is_asked_for, release, served

DIMS = {"spatial_shard_height": -2, "spatial_shard_width": -1}  # by ``--vae-parallel-mode``

logger = logging.getLogger(__name__)


def register() -> None:
    """Have vLLM-Omni's autoencoders sharded where its mode says so; nothing without DISTPATCH_SERVING=1."""
    if not is_asked_for():
        return
    from vllm_omni.diffusion.distributed.autoencoders.distributed_vae_executor import DistributedVaeMixin

    set_size = DistributedVaeMixin.set_parallel_size
    if hasattr(set_size, "__wrapped__"):  # plug-ins may be loaded several times
        return

    @functools.wraps(set_size)
    def sharded(self: Any, parallel_size: int, mode: str = "tile") -> None:
        set_size(self, parallel_size, mode=mode)
        shard(self)

    DistributedVaeMixin.set_parallel_size = sharded


def shard(vae: Any) -> bool:
    """Shard the calls of a ``DistributedVaeMixin`` if its parallel size and mode say so; returns whether they do.

    Every rank of the server calls ``encode``, ``decode`` and ``decode_with_chunks`` then, as it does for its tiles, and
    gets the whole result. Raises ``DistPatchError`` where the size is not that of the executor's group.
    """
    release(vae)
    vae.__dict__.pop("decode_with_chunks", None)
    executor = vae.distributed_executor
    dim = DIMS.get(executor.parallel_mode)
    if dim is None or executor.parallel_size <= 1:
        return False
    if executor.parallel_size != executor.world_size:
        raise DistPatchError(
            f"{type(vae).__name__} in mode {executor.parallel_mode}: all {executor.world_size} ranks of its group "
            f"decode together; set --vae-patch-parallel-size to {executor.world_size}, not {executor.parallel_size}"
        )
    group = executor.group or dist.group.WORLD
    aside = [SetAside(executor, "parallel_size", 1), SetAside(vae, "use_tiling", False)]
    calls = ShardedCalls(vae, lambda: group, dim, aside)
    if hasattr(vae, "decode_with_chunks"):
        vae.__dict__["decode_with_chunks"] = functools.partial(_decode_with_chunks, calls)
    logger.info(
        "distpatch: %s is sharded over %d ranks (%s)", type(vae).__name__, executor.world_size, executor.parallel_mode
    )
    return True


@torch.compiler.disable
def _decode_with_chunks(calls: ShardedCalls, z: Tensor, *, on_chunk: Callable[[Tensor], None]) -> None:
    """Frames to the first rank's ``on_chunk`` as they are decoded; its error is raised when all ranks are through."""
    vae: Any = calls.vae
    with calls.whole() as group:
        is_whole = isinstance(frame_caches(vae, "decode"), str)
        chunks = (vae.decode(z).sample,) if is_whole else VideoStream(vae).frames(z.split(1, 2))
        error: BaseException | None = None
        for frames in chunks:
            if dist.get_rank(group) == 0 and error is None:
                try:
                    on_chunk(frames)
                except BaseException as raised:
                    error = raised
    if error is not None:
        raise error


@dataclass
class StreamState:
    """One session's stream, as vLLM-Omni's ``StreamingDecodeState``: bytes are those of this rank."""

    session_id: str
    stream: VideoStream
    frames_decoded: int = 0
    chunks_decoded: int = 0

    def nbytes(self) -> int:
        return sum(self.nbytes_by_device().values())

    def nbytes_by_device(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for tensor in self.stream.tensors():
            device = str(tensor.device)
            found[device] = found.get(device, 0) + tensor.numel() * tensor.element_size()
        return found

    @property
    def started(self) -> bool:
        return self.frames_decoded > 0

    def release(self) -> None:
        self.stream = VideoStream(self.stream.vae)
        self.frames_decoded = self.chunks_decoded = 0


@dataclass
class StreamingDecoder:
    """vLLM-Omni's ``SupportsStreamingDecode``: a session's chunks are those of the whole clip, caches are sharded.

    ``vae``: one that ``VideoStream`` takes, sharded or not; every rank decodes every chunk. ``bytes_per_pixel_fp32``:
    of a session's caches on one device, measured once for a checkpoint, as ``WanStreamingDecoder`` takes it.
    """

    vae: Any
    bytes_per_pixel_fp32: float | None = None

    def new_decode_state(self, session_id: str) -> StreamState:
        if not isinstance(session_id, str) or not session_id.strip():
            raise ValueError("session_id must be a non-empty string")
        return StreamState(session_id, VideoStream(self.vae))

    def decode_chunk(self, latent: Tensor, state: StreamState) -> Tensor:
        """The frames of the next latents, (1, C, T, H, W), which go on from those that ``state`` has seen."""
        calls = served(self.vae)
        with nullcontext() if calls is None else calls.whole():
            frames: Tensor = state.stream.decode(latent).sample
        state.frames_decoded += latent.shape[2]
        state.chunks_decoded += 1
        return frames

    def release(self, state: StreamState) -> None:
        state.release()

    def declared_state_bytes(self, *, height: int, width: int, dtype: torch.dtype) -> int:
        """Bytes that a session's caches take on one rank, for frames of this size."""
        if self.bytes_per_pixel_fp32 is None:
            raise RuntimeError("declared_state_bytes: pass bytes_per_pixel_fp32, measured once for the checkpoint")
        calls = served(self.vae)
        group = None if calls is None else calls.group()
        rows = height if group is None else -(-height // group.size())
        return int(self.bytes_per_pixel_fp32 * rows * width * torch.empty((), dtype=dtype).element_size() / 4)
