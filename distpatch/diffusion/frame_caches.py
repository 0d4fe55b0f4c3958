"""What causal autoencoders keep from frame to frame, each in its own way: taken out, and put back for the next call.

A way serves one direction (``decode`` or ``encode``) of one model. What it keeps is the model's own tensors, of a
converted model each rank's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

Kept = Any  # what a way keeps from one call to the next; None before the first


class FrameCaches(Protocol):
    """How one direction of a model goes on from the frames of an earlier call."""

    def refusal(self, frames: int, later: bool, options: Mapping[str, Any]) -> str | None:
        """Why a chunk of so many frames would give another clip; ``options``: keywords of the call."""

    def given(self, frames: Tensor, later: bool) -> Tensor:
        """What the model is called with for these frames."""

    def resumed(self, kept: Kept) -> AbstractContextManager[Callable[[], Kept]]:
        """While it is open, a call goes on from what was kept; what is yielded says what to keep of it."""


def frame_caches(vae: Any, method: str) -> FrameCaches | str:
    """The way of this model, or why it has none."""
    names = {cls.__name__ for cls in type(vae).__mro__}
    if callable(getattr(vae, "clear_cache", None)):
        vae.clear_cache()
        if isinstance(getattr(vae, FeatureMaps.ATTRIBUTES[method], None), list):
            return FeatureMaps(vae, method)
    if "AutoencoderKLCogVideoX" in names:
        return ConvCaches(vae, method)
    if method == "encode" and "AutoencoderKLMochi" in names:
        return "attention of its encoder looks at all earlier frames, and what it would keep grows with the clip"
    if names & {"AutoencoderKLMochi", "AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video"}:
        return PaddedConvolutions(vae, method)
    if "AutoencoderKLHunyuanVideo15" in names:
        return "its attention looks at all earlier frames, and what it would keep grows with the clip"
    if "AutoencoderKLHunyuanVideo" in names:
        return (
            "its attention looks at all earlier frames and its group norms at all frames of a call; by itself it takes "
            "long clips in tiles of frames that overlap, within one call"
        )
    return (
        "it keeps no caches from frame to frame that distpatch knows, as Wan, Qwen-Image, CogVideoX, LTX and Mochi do"
    )


class FeatureMaps:
    """Wan and Qwen-Image: lists of the last frames before each causal convolution, in attributes of the model."""

    ATTRIBUTES: ClassVar = {"decode": "_feat_map", "encode": "_enc_feat_map"}
    ENCODED = 4  # frames that become one of latents; the first frame one of its own

    def __init__(self, vae: Any, method: str) -> None:
        self.vae, self.encodes, self.attribute = vae, method == "encode", self.ATTRIBUTES[method]

    def refusal(self, frames: int, later: bool, options: Mapping[str, Any]) -> str | None:
        if self.encodes and frames % self.ENCODED != (0 if later else 1):
            return f"frames come 1 + {self.ENCODED} n in the first chunk, {self.ENCODED} n in later ones; got {frames}"
        return None

    def given(self, frames: Tensor, later: bool) -> Tensor:
        """The model encodes the first frame by itself: later chunks have one for it, which is not computed."""
        return torch.cat([frames[:, :, :1], frames], 2) if later and self.encodes else frames

    @contextmanager
    def resumed(self, kept: Kept) -> Iterator[Callable[[], Kept]]:
        vae, nothing = self.vae, None
        vae.clear_cache()
        with ExitStack() as undo:
            undo.callback(vae.clear_cache)
            if kept is not None:
                caches, nothing = kept
                setattr(vae, self.attribute, list(caches))  # a chunk that fails may be given again
            if self.encodes:
                encoder = _FirstLeftOut(vae.encoder.forward, nothing)
                undo.callback(_replaced(vae.encoder, "forward", encoder))
            elif kept is not None:
                undo.callback(vae.decoder.register_forward_pre_hook(_goes_on, with_kwargs=True).remove)
            undo.callback(_replaced(vae, "clear_cache", lambda: None))
            yield lambda: (getattr(vae, self.attribute), encoder.nothing if self.encodes else None)


class _FirstLeftOut:
    """An encoder's forward, which gives ``nothing`` in place of its first call, where that is not None: no frames."""

    def __init__(self, forward: Callable[..., Tensor], nothing: Tensor | None) -> None:
        self.forward, self.nothing, self.leaves_out = forward, nothing, nothing is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.leaves_out:
            self.leaves_out = False
            assert self.nothing is not None
            return self.nothing
        out = self.forward(*args, **kwargs)
        self.nothing = out[:, :, :0].clone()
        return out


def _goes_on(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "first_chunk": False} if "first_chunk" in kwargs else kwargs


class ConvCaches:
    """CogVideoX: a dict of them, which decoder and encoder take as an argument and return.

    Its group norms look at all frames of such a call, so that chunks have to be cut where the model itself cuts.
    """

    def __init__(self, vae: Any, method: str) -> None:
        self.part = vae.decoder if method == "decode" else vae.encoder
        self.of_one = vae.num_latent_frames_batch_size if method == "decode" else vae.num_sample_frames_batch_size

    def refusal(self, frames: int, later: bool, options: Mapping[str, Any]) -> str | None:
        n = self.of_one
        if frames < n or (later and frames % n):
            return (
                f"it takes {n} frames at a time, and what is left over with the first ones: the first chunk has {n} or "
                f"more, later ones a multiple of {n}; got {frames}"
            )
        return None

    def given(self, frames: Tensor, later: bool) -> Tensor:
        return frames

    @contextmanager
    def resumed(self, kept: Kept) -> Iterator[Callable[[], Kept]]:
        held, forward = [kept], self.part.forward

        def going_on(*args: Any, conv_cache: Any = None, **kwargs: Any) -> Any:
            out, held[0] = forward(*args, conv_cache=held[0], **kwargs)
            return out, held[0]

        undo = _replaced(self.part, "forward", going_on)
        try:
            yield lambda: held[0]
        finally:
            undo()


class PaddedConvolutions:
    """Mochi and LTX: causal convolutions that repeat the first frame in front of a call's frames, and keep nothing.

    In later chunks the last frames of the chunk before stand where the model has put the repeated ones. A layer that
    changes the number of frames, and treats the first frame as the clip's first, is given one more, and its result is
    left out.
    """

    def __init__(self, vae: Any, method: str) -> None:
        self.vae, self.encodes = vae, method == "encode"
        self.part: Any = vae.encoder if self.encodes else vae.decoder

    def refusal(self, frames: int, later: bool, options: Mapping[str, Any]) -> str | None:
        looks_ahead = any(getattr(module, "is_causal", True) is False for module in self.part.modules())
        if looks_ahead and not options.get("causal"):
            return "it is not causal: its frames depend on later ones, which are not there yet"
        if any(getattr(module, "per_channel_scale1", None) is not None for module in self.part.modules()):
            return "it adds noise, which each call draws anew"
        if self.vae.use_framewise_encoding or self.vae.use_framewise_decoding:
            return "it is set to take frames in tiles: set use_framewise_encoding and use_framewise_decoding to False"
        ratio = self._frames_of_one()
        if self.encodes and frames % ratio != (0 if later else 1):
            return f"frames come 1 + {ratio} n in the first chunk, {ratio} n in later ones; got {frames}"
        return None

    def _frames_of_one(self) -> int:
        """Frames that the encoder makes one of."""
        layers = list(self.part.modules())
        strides = [conv.stride[0] for conv in layers if isinstance(conv, nn.Conv3d)]
        strides += [layer.stride[0] for layer in layers if _changes_frames(layer)]  # type: ignore[index, misc]
        return math.prod(strides) * self.vae.config.get("patch_size_t", 1)

    def given(self, frames: Tensor, later: bool) -> Tensor:
        return frames

    @contextmanager
    def resumed(self, kept: Kept) -> Iterator[Callable[[], Kept]]:
        keeps: dict[str, Tensor] = {}
        leads: dict[nn.Module, int] = {}
        with ExitStack() as undo:
            if kept is not None:
                if getattr(self.vae, "drop_last_temporal_frames", False):  # which drops the clip's first ones
                    undo.callback(_replaced(self.vae, "drop_last_temporal_frames", False))
                for module in self.part.modules():
                    if _changes_frames(module):
                        leads[module.conv.conv] = _led(module)
                        undo.callback(module.register_forward_pre_hook(_one_more).remove)
                        undo.callback(module.register_forward_hook(_one_less).remove)
            for name, module in self.part.named_modules():
                if isinstance(conv := getattr(module, "conv", None), nn.Conv3d) and conv.kernel_size[0] > 1:
                    before = None if kept is None else kept[name]
                    hook = partial(_continued, keeps, name, before, leads.get(conv, 0))
                    undo.callback(conv.register_forward_pre_hook(hook).remove)
            yield lambda: keeps


def _changes_frames(module: Any) -> bool:
    """Whether it is a layer of LTX that does, and is more than a convolution."""
    return type(module).__name__.endswith(("Upsampler3d", "Downsampler3d")) and module.stride[0] > 1


def _led(module: Any) -> int:
    """How many frames its convolution has in front of the chunk's own, where it is given one more."""
    return 1 if type(module).__name__.endswith("Upsampler3d") else int(module.stride[0])


def _one_more(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.cat([args[0][:, :, :1], args[0]], 2), *args[1:]


def _one_less(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out[:, :, 1:]


def _continued(
    keeps: dict[str, Tensor], name: str, before: Tensor | None, lead: int, conv: nn.Conv3d, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The frames of a causal convolution, with those of before in place of what the model has put in front of them."""
    x, size, stride = args[0], conv.kernel_size[0], conv.stride[0]
    if before is not None:
        x = torch.cat([x[:, :, :lead], before, x[:, :, lead + size - 1 :]], 2)
    keeps[name] = x[:, :, ((x.shape[2] - size) // stride + 1) * stride :].clone()
    return (x, *args[1:])


def _replaced(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Give an object an attribute of its own; returns what takes it back."""
    before = owner.__dict__.get(name)
    owner.__dict__[name] = value

    def undo() -> None:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before

    return undo
