"""Nets of the shapes of Stable Diffusion's and Wan's decoders and of a denoiser, in plain torch; random weights.

Written for this kit, so that it needs no library of models.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_default_generator = threading.Lock()


def seeded(build: Callable[[], M], seed: int = 0) -> M:
    """The net with weights of this seed, in eval mode; the default generator, which threads share, stays as it was."""
    with _default_generator, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a skip; ``embedding``: channels of what shifts it in between, or 0."""

    def __init__(self, channels_in: int, channels: int, groups: int, embedding: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shift = nn.Linear(embedding, channels) if embedding else None
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.shift is not None and embedding is not None:
            h = h + self.shift(F.silu(embedding))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """All pixels attend to all pixels, or to the tokens of a ``context`` of so many channels."""

    def __init__(self, channels: int, heads: int, groups: int, context: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(context or channels, channels)
        self.value = nn.Linear(context or channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        source = tokens if context is None else context
        query, key, value = (
            layer(t).view(batch, -1, self.heads, channels // self.heads).transpose(1, 2)
            for layer, t in ((self.query, tokens), (self.key, source), (self.value, source))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, -1, channels)
        return x + self.out(attended).transpose(1, 2).reshape(batch, channels, height, width)


class Up(nn.Module):
    """Twice the size, nearest, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Down(nn.Module):
    """Half the size by a convolution that is padded at one side only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class SdDecoder(nn.Module):
    """Stable Diffusion's decoder: latents (B, 4, H, W) to images (B, 3, 8 H, 8 W) with four levels of channels."""

    def __init__(
        self,
        channels: Sequence[int] = (128, 256, 512, 512),
        blocks: int = 3,
        groups: int = 32,
        latent_channels: int = 4,
    ) -> None:
        super().__init__()
        deepest = channels[-1]
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.conv_in = nn.Conv2d(latent_channels, deepest, 3, padding=1)
        self.middle = nn.Sequential(
            ResBlock(deepest, deepest, groups), Attention(deepest, 1, groups), ResBlock(deepest, deepest, groups)
        )
        levels: list[nn.Module] = []
        width = deepest
        for level in reversed(range(len(channels))):
            for _ in range(blocks):
                levels.append(ResBlock(width, channels[level], groups))
                width = channels[level]
            if level > 0:
                levels.append(Up(width))
        self.levels = nn.Sequential(*levels)
        self.norm_out = nn.GroupNorm(groups, width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.levels(self.middle(self.conv_in(self.post_quant_conv(latents))))
        return self.conv_out(F.silu(self.norm_out(h)))

    def decode(self, latents: Tensor) -> Tensor:
        return self(latents)


class RmsNorm(nn.Module):
    """Each pixel's channels over their root mean square."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.scale * self.gamma.view(-1, *[1] * (x.ndim - 2))


class CausalConv(nn.Conv3d):
    """A 3-D convolution that sees earlier frames only; ``cache`` keeps the last ones from one chunk to the next."""

    def __init__(self, channels_in: int, channels: int, kernel: int = 3) -> None:
        super().__init__(channels_in, channels, kernel, padding=(0, kernel // 2, kernel // 2))
        self.frames = kernel - 1
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.frames == 0:
            return super().forward(x)
        x = F.pad(x, (0, 0, 0, 0, self.frames, 0)) if self.cache is None else torch.cat([self.cache, x], dim=2)
        self.cache = x[:, :, -self.frames :].clone()
        return super().forward(x)


class CausalBlock(nn.Module):
    """Norm, SiLU, causal convolution, twice, around a skip."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            RmsNorm(channels_in),
            nn.SiLU(),
            CausalConv(channels_in, channels),
            RmsNorm(channels),
            nn.SiLU(),
            CausalConv(channels, channels),
        )
        self.skip = CausalConv(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


class FrameAttention(nn.Module):
    """Attention among the pixels of each frame, by 1 × 1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RmsNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        images = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        tokens = self.qkv(self.norm(images)).reshape(batch * frames, 1, 3 * channels, -1).transpose(2, 3).contiguous()
        query, key, value = tokens.chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value).squeeze(1).transpose(1, 2)
        images = self.out(attended.reshape(batch * frames, channels, height, width))
        return x + images.view(batch, frames, channels, height, width).transpose(1, 2)


class FrameUp(nn.Module):
    """Every frame at twice its size and with half of its channels."""

    def __init__(self, channels: int, channels_out: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"), nn.Conv2d(channels, channels_out, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        images = self.resample(x.transpose(1, 2).reshape(batch * frames, channels, height, width))
        return images.view(batch, frames, *images.shape[1:]).transpose(1, 2)


class WanDecoder(nn.Module):
    """Wan's video decoder: latents (B, 16, T, H, W) to clips (B, 3, T, 8 H, 8 W), one frame of latents at a time.

    Between frames each causal convolution keeps what it read last. (Wan also doubles frames; this does not.)
    """

    def __init__(self, channels: int = 96, factors: Sequence[int] = (4, 4, 2, 1), latent_channels: int = 16) -> None:
        super().__init__()
        widths = [channels * factor for factor in factors]
        self.conv1 = CausalConv(latent_channels, latent_channels, 1)
        self.conv_in = CausalConv(latent_channels, widths[0])
        self.middle = nn.Sequential(
            CausalBlock(widths[0], widths[0]), FrameAttention(widths[0]), CausalBlock(widths[0], widths[0])
        )
        levels: list[nn.Module] = []
        width = widths[0]
        for level, wide in enumerate(widths):
            levels += [CausalBlock(width, wide), CausalBlock(wide, wide)]
            width = wide
            if level < len(widths) - 1:
                levels.append(FrameUp(width, width // 2))
                width //= 2
        self.levels = nn.Sequential(*levels)
        self.head = nn.Sequential(RmsNorm(width), nn.SiLU(), CausalConv(width, 3))

    def forward(self, latents: Tensor) -> Tensor:
        self.clear()
        latents = self.conv1(latents)
        frames = [
            self.head(self.levels(self.middle(self.conv_in(latents[:, :, t : t + 1])))) for t in range(latents.shape[2])
        ]
        self.clear()
        return torch.cat(frames, dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        return self(latents)

    def clear(self) -> None:
        """Forget the frames before."""
        for module in self.modules():
            if isinstance(module, CausalConv):
                module.cache = None


class UNet(nn.Module):
    """A denoiser: images (B, C, H, W) and times (B,), of the same size out; attention, skips and a time embedding.

    ``context``: channels of tokens (B, N, context) that the images attend to, or 0.
    """

    def __init__(
        self,
        channels: Sequence[int] = (320, 640, 1280, 1280),
        blocks: int = 2,
        groups: int = 32,
        heads: int = 8,
        image_channels: int = 4,
        context: int = 0,
    ) -> None:
        super().__init__()
        self.width, embedding = channels[0], 4 * channels[0]
        self.embed = nn.Sequential(nn.Linear(self.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.conv_in = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        skips, width = [channels[0]], channels[0]
        for level, wide in enumerate(channels):
            for _ in range(blocks):
                self.downs.append(_Stage(width, wide, level > 0, groups, heads, embedding, context))
                width = wide
                skips.append(width)
            if level < len(channels) - 1:
                self.downs.append(Down(width))
                skips.append(width)
        self.middle = _Stage(width, width, True, groups, heads, embedding, context)
        for level, wide in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):
                self.ups.append(_Stage(width + skips.pop(), wide, level > 0, groups, heads, embedding, context))
                width = wide
            if level > 0:
                self.ups.append(Up(width))
        self.norm_out = nn.GroupNorm(groups, width)
        self.conv_out = nn.Conv2d(width, image_channels, 3, padding=1)

    def forward(self, x: Tensor, times: Tensor, context: Tensor | None = None) -> Tensor:
        embedding = self.embed(self._waves(times))
        h = self.conv_in(x)
        skips = [h]
        for stage in self.downs:
            h = stage(h, embedding, context) if isinstance(stage, _Stage) else stage(h)
            skips.append(h)
        h = self.middle(h, embedding, context)
        for stage in self.ups:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding, context) if isinstance(stage, _Stage) else stage(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    def _waves(self, times: Tensor) -> Tensor:
        half = self.width // 2
        weight = self.conv_in.weight
        rates = torch.exp(torch.arange(half, device=times.device, dtype=weight.dtype) * (-math.log(10000) / half))
        angles = times.to(weight.dtype)[:, None] * rates[None]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class _Stage(nn.Module):
    def __init__(
        self, channels_in: int, channels: int, attends: bool, groups: int, heads: int, embedding: int, context: int
    ) -> None:
        super().__init__()
        self.block = ResBlock(channels_in, channels, groups, embedding)
        self.attention = Attention(channels, heads, groups) if attends else None
        self.cross = Attention(channels, heads, groups, context) if attends and context else None

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross is not None:
            x = self.cross(x, context)
        return x
