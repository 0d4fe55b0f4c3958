"""A clip decoded chunk by chunk, by a causal autoencoder whose caches are kept, sharded, from one chunk to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from distpatch.errors import DistPatchError
from distpatch.model.calls import conversion_of

CACHE, FORGET = "_feat_map", "clear_cache"  # of the autoencoders of diffusers that decode a frame of latents at a time


class VideoStream:
    """One clip on its way through ``vae.decode``: all chunks together give the frames of the whole clip.

    >>> stream = distpatch.VideoStream(vae)
    >>> for chunk in latents.split(4, dim=2):  # (B, C, t, h, w)
    ...     frames = stream.decode(chunk).sample

    Between chunks it holds the caches of the model's causal convolutions, of a converted model each rank its rows:
    memory does not grow with the clip, and clips of one model may take turns, each with a stream. Frames have the bits
    of ``vae.decode`` of the whole clip, where torch's kernel for a 1x1 convolution does not round by the number of
    frames (Wan 2.2: to rounding). ``vae``: Wan, Qwen-Image and others of diffusers that keep such caches in themselves,
    converted or not. Raises
    ``DistPatchError`` for other models, and for what would give another clip: tiles, slices of a batch, chunks of
    other sizes than the first, a model that was converted or restored in between.
    """

    def __init__(self, vae: nn.Module) -> None:
        forget = getattr(vae, FORGET, None)
        if callable(forget):
            forget()  # it makes the caches, empty
        if not callable(forget) or not isinstance(getattr(vae, CACHE, None), list):
            raise DistPatchError(
                f"VideoStream: {type(vae).__name__} keeps no caches from frame to frame in itself, as AutoencoderKLWan "
                "and AutoencoderKLQwenImage do: decode its clip as a whole"
            )
        self.vae = vae
        self._caches: list[Any] | None = None
        self._first: Any = None  # of the first chunk: all that the others must share

    def decode(self, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The next frames: ``vae.decode(latents)`` of a chunk; every rank calls it."""
        vae, this = self.vae, (latents.shape[:2], latents.shape[3:], conversion_of(self.vae))
        if getattr(vae, "use_tiling", False) or (getattr(vae, "use_slicing", False) and len(latents) > 1):
            raise DistPatchError("VideoStream: call disable_tiling() and disable_slicing() on the model first")
        if self._caches is not None and self._first != this:
            raise DistPatchError(
                f"VideoStream: a chunk of shape {tuple(latents.shape)} does not follow the first one: all of a clip "
                "differ in their frames alone, and the model stays as it was. Another clip takes another VideoStream"
            )
        self._first = this
        with self._resumed():
            return vae.decode(latents, *args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _resumed(self) -> Iterator[None]:
        """With the caches of this clip in the model, which forgets them neither before nor after the call."""
        vae: Any = self.vae
        vae.clear_cache()
        hook = None
        if self._caches is not None:
            setattr(vae, CACHE, list(self._caches))  # a chunk that fails may be decoded again
            hook = vae.decoder.register_forward_pre_hook(_goes_on, with_kwargs=True)
        vae.__dict__[FORGET] = lambda: None
        try:
            yield
            self._caches = getattr(vae, CACHE)
        finally:
            del vae.__dict__[FORGET]
            vae.clear_cache()
            if hook is not None:
                hook.remove()


def _goes_on(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "first_chunk": False} if "first_chunk" in kwargs else kwargs
