"""A clip decoded, or encoded, chunk by chunk: what a causal autoencoder keeps stays, sharded, from one to the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from distpatch.diffusion.frame_caches import Kept, frame_caches
from distpatch.errors import DistPatchError
from distpatch.model.calls import conversion_of
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.tree import tensors_in


class VideoStream:
    """One clip on its way through ``vae.decode``: all chunks together give the frames of the whole clip.

    >>> stream = distpatch.VideoStream(vae)
    >>> for chunk in latents.split(4, dim=2):  # (B, C, t, h, w)
    ...     frames = stream.decode(chunk).sample

    Between chunks it holds the last frames before each of the model's causal convolutions, of a converted model each
    rank its rows: memory does not grow with the clip, and clips of one model may take turns, each with a stream.
    Chunks are those of the whole clip, to the bit where torch's kernels do not round by the number of frames.

    ``vae``: of diffusers, converted or not: Wan, Qwen-Image, CogVideoX, Mochi, causal LTX and LTX-2. Raises
    ``DistPatchError`` for other models, and for what would give another clip: tiles, slices of a batch, chunks of
    other sizes than the first, a model that was converted or restored in between.
    """

    def __init__(self, vae: nn.Module) -> None:
        self.vae = vae
        ways = {method: frame_caches(vae, method) for method in ("decode", "encode")}
        if all(isinstance(way, str) for way in ways.values()):
            raise DistPatchError(f"VideoStream: {type(vae).__name__} works on whole clips: {ways['decode']}")
        self._ways = ways
        self._kept: dict[str, Kept] = dict.fromkeys(ways)
        self._first: dict[str, Any] = {}  # of the first chunk: all that the others must share

    def decode(self, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The next frames: ``vae.decode(latents)`` of a chunk; every rank calls it."""
        return self._next("decode", latents, args, kwargs)

    def encode(self, frames: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The next latents: ``vae.encode(frames)`` of a chunk, such as 1 + 4 n frames first and then 4 n (Wan).

        The distribution's mean and deviation are those of the whole clip; what is drawn of it is drawn chunk by chunk.
        """
        return self._next("encode", frames, args, kwargs)

    def frames(self, chunks: Iterable[Tensor], *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        """The frames of each chunk of latents, (B, C, t, h, w), as they are decoded: also for ``save_video``."""
        for chunk in chunks:
            yield self.decode(chunk, *args, **kwargs).sample

    def tensors(self) -> Iterator[Tensor]:
        """What it holds between chunks: of a converted model this rank's rows."""
        return map(_rows, tensors_in(list(self._kept.values())))

    def _next(self, method: str, x: Tensor, args: Any, kwargs: Any) -> Any:
        vae, way, kept = self.vae, self._ways[method], self._kept[method]
        later, this = kept is not None, (x.shape[:2], x.shape[3:], conversion_of(vae))
        name = f"VideoStream.{method}: {type(vae).__name__}"
        if isinstance(way, str):
            raise DistPatchError(f"{name} works on whole clips: {way}")
        if getattr(vae, "use_tiling", False) or (getattr(vae, "use_slicing", False) and len(x) > 1):
            raise DistPatchError("VideoStream: call disable_tiling() and disable_slicing() on the model first")
        if later and self._first[method] != this:
            raise DistPatchError(
                f"VideoStream: a chunk of shape {tuple(x.shape)} does not follow the first one: all of a clip "
                "differ in their frames alone, and the model stays as it was. Another clip takes another VideoStream"
            )
        if refusal := way.refusal(x.shape[2], later, kwargs):
            raise DistPatchError(f"{name}, a chunk of shape {tuple(x.shape)}: {refusal}")
        self._first[method] = this
        with way.resumed(kept) as keep:
            result = getattr(vae, method)(way.given(x, later), *args, **kwargs)
            self._kept[method] = keep()
        return result


def _rows(tensor: Tensor) -> Tensor:
    return _rows(tensor.local) if isinstance(tensor, PatchTensor) else tensor
