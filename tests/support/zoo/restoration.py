"""Restoration nets in plain PyTorch, in the words of their papers: one block of each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tests.support.zoo.models import conv3


class ChannelNorm(nn.Module):
    """Layer norm over channels, by tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        return rearrange(self.norm(rearrange(x, "b c h w -> b (h w) c")), "b (h w) c -> b c h w", h=h, w=w)


class RestormerBlock(nn.Module):
    """Attention of channels on channels: its scores are sums over all pixels. Then a gated feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.norms = nn.ModuleList([ChannelNorm(width), ChannelNorm(width)])
        self.qkv = nn.Sequential(nn.Conv2d(width, 3 * width, 1), conv3(3 * width, 3 * width, groups=3 * width))
        self.out = nn.Conv2d(width, width, 1)
        self.gates = nn.Sequential(nn.Conv2d(width, 4 * width, 1), conv3(4 * width, 4 * width, groups=4 * width))
        self.down = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        qkv = self.qkv(self.norms[0](x)).chunk(3, dim=1)
        q, k, v = (rearrange(t, "b (n c) h w -> b n c (h w)", n=self.heads) for t in qkv)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        x = x + self.out(rearrange(scores.softmax(-1) @ v, "b n c (h w) -> b (n c) h w", h=h, w=w))
        one, other = self.gates(self.norms[1](x)).chunk(2, dim=1)
        return x + self.down(F.gelu(one) * other)


class Restormer(nn.Module):
    """Two levels, by pixel unshuffle and shuffle; odd images are padded by reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = conv3(3, 8), conv3(8, 3)
        self.blocks = nn.ModuleList([RestormerBlock(8, 1), RestormerBlock(16, 2), RestormerBlock(8, 1)])
        self.down = nn.Sequential(conv3(8, 4), nn.PixelUnshuffle(2))
        self.up = nn.Sequential(conv3(16, 32), nn.PixelShuffle(2))
        self.merge = nn.Conv2d(16, 8, 1)

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        padded = F.pad(image, (0, -w % 2, 0, -h % 2), mode="reflect")
        skip = self.blocks[0](self.enter(padded))
        x = self.merge(torch.cat([self.up(self.blocks[1](self.down(skip))), skip], 1))
        return (self.leave(self.blocks[2](x)) + padded)[:, :, :h, :w]


class PixelNorm(torch.autograd.Function):
    """NAFNet's layer norm over channels, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        y = (x - mean) / (var + 1e-6).sqrt()
        ctx.save_for_backward(y, var, weight)
        return weight.view(1, -1, 1, 1) * y + bias.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        y, var, weight = ctx.saved_tensors
        g = grad * weight.view(1, -1, 1, 1)
        d_x = (g - y * (g * y).mean(1, keepdim=True) - g.mean(1, keepdim=True)) / (var + 1e-6).sqrt()
        return d_x, (grad * y).sum(3).sum(2).sum(0), grad.sum(3).sum(2).sum(0)


class NAFBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.spatial = nn.Sequential(nn.Conv2d(width, 2 * width, 1), conv3(2 * width, 2 * width, groups=2 * width))
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1))
        self.out = nn.Conv2d(width, width, 1)
        self.beta = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.spatial(PixelNorm.apply(x, self.weight, self.bias)).chunk(2, dim=1)
        gated = one * other
        return x + self.out(gated * self.attention(gated)) * self.beta


class NAFNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = conv3(3, 8), conv3(8, 3)
        self.blocks = nn.ModuleList([NAFBlock(8), NAFBlock(16), NAFBlock(8)])
        self.down = nn.Conv2d(8, 16, 2, 2)
        self.up = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.PixelShuffle(2))

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        padded = F.pad(image, (0, -w % 2, 0, -h % 2))
        skip = self.blocks[0](self.enter(padded))
        x = self.up(self.blocks[1](self.down(skip))) + skip
        return (self.leave(self.blocks[2](x)) + padded)[:, :, :h, :w]


class EDSR(nn.Module):
    """Three times the size, by pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = conv3(3, 8)
        self.blocks = nn.ModuleList([nn.Sequential(conv3(8, 8), nn.ReLU(True), conv3(8, 8)) for _ in range(2)])
        self.up = nn.Sequential(conv3(8, 72), nn.PixelShuffle(3), conv3(8, 3))

    def forward(self, image: Tensor) -> Tensor:
        x = entered = self.enter(image)
        for block in self.blocks:
            x = x + block(x) * 0.1
        return self.up(x + entered)


class HAT(nn.Module):
    """Shifted windows with relative positions and a mask, as Swin has them; then overlapping ones by unfold."""

    window, heads = 4, 2

    def __init__(self) -> None:
        super().__init__()
        size = self.window
        self.enter, self.qkv, self.out = conv3(3, 4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn((2 * size - 1) ** 2, self.heads))
        self.overlapping = nn.Unfold(size + 2, stride=size, padding=1)
        place = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
        offset = place[:, :, None] - place[:, None] + size - 1
        self.register_buffer("which", offset[0] * (2 * size - 1) + offset[1])

    def windows(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        size = self.window
        x = x.view(b, h // size, size, w // size, size, c)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, c)

    def image(self, windows: Tensor, h: int, w: int) -> Tensor:
        size = self.window
        x = windows.view(-1, h // size, w // size, size, size, windows.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(len(x), h, w, -1)

    def mask(self, h: int, w: int, like: Tensor) -> Tensor:
        """What came from the other side of the image is not seen."""
        region = torch.zeros(1, h, w, 1, dtype=like.dtype, device=like.device)
        size, number = self.window, 0
        for rows in (slice(0, -size), slice(-size, -size // 2), slice(-size // 2, None)):
            for columns in (slice(0, -size), slice(-size, -size // 2), slice(-size // 2, None)):
                region[:, rows, columns] = number
                number += 1
        of = self.windows(region).squeeze(-1)
        return (of.unsqueeze(1) - of.unsqueeze(2)).ne(0).to(like.dtype) * -100

    def shifted(self, x: Tensor) -> Tensor:
        _, h, w, c = x.shape
        half = self.window // 2
        tokens = self.windows(torch.roll(x, (-half, -half), (1, 2)))
        count, area = tokens.shape[:2]
        q, k, v = self.qkv(tokens).reshape(count, area, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.which.view(-1)].view(area, area, -1).permute(2, 0, 1)
        mask = self.mask(h, w, x)
        scores = (q @ k.transpose(-2, -1) + bias).view(-1, len(mask), self.heads, area, area)
        scores = (scores + mask[None, :, None]).view(count, self.heads, area, area)
        seen = (scores.softmax(-1) @ v).transpose(1, 2).reshape(count, area, c)
        return torch.roll(self.image(self.out(seen), h, w), (half, half), (1, 2))

    def forward(self, image: Tensor) -> Tensor:
        size, (h, w) = self.window, image.shape[-2:]
        x = F.pad(self.enter(image), (0, -w % size, 0, -h % size), mode="reflect")
        x = x + self.shifted(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        around = rearrange(self.overlapping(x), "b (c n) windows -> (b windows) n c", c=4)
        inside = self.windows(x.permute(0, 2, 3, 1))
        seen = F.scaled_dot_product_attention(inside, around, around)
        return (x + self.image(seen, *x.shape[-2:]).permute(0, 3, 1, 2))[:, :, :h, :w]


class DAT(nn.Module):
    """Attention to points that the image itself chooses; their relative positions are sampled from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.q, self.k, self.v = conv3(3, 4), *(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.offsets = nn.Sequential(nn.Conv2d(4, 4, 5, stride=2, padding=2), nn.GELU(), nn.Conv2d(4, 2, 1))
        self.table = nn.Parameter(torch.randn(1, 1, 9, 9))

    @staticmethod
    def grid(h: int, w: int, like: Tensor) -> Tensor:
        rows, columns = (torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device) for n in (h, w))
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.enter(image)
        b, c, h, w = x.shape
        offsets = self.offsets(x).tanh().permute(0, 2, 3, 1) * 0.2
        points_each = offsets.shape[1] * offsets.shape[2]
        points = (offsets + self.grid(*offsets.shape[1:3], x)).clamp(-1, 1)
        sampled = F.grid_sample(x, points[..., (1, 0)], mode="bilinear", align_corners=True).reshape(
            b, c, 1, points_each
        )
        k, v = (layer(sampled).reshape(b, c, points_each) for layer in (self.k, self.v))
        scores = torch.einsum("b c m, b c n -> b m n", self.q(x).reshape(b, c, h * w), k)
        offset = self.grid(h, w, x).reshape(1, h * w, 1, 2) - points.reshape(b, 1, points_each, 2)
        bias = F.grid_sample(self.table.expand(b, -1, -1, -1), offset[..., (1, 0)] * 0.5, align_corners=True)
        weights = (scores + bias.squeeze(1)).softmax(-1)
        return torch.einsum("b m n, b c n -> b c m", weights, v).reshape(b, c, h, w)


class FourierUnit(nn.Module):
    """A 1×1 convolution of the image's spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.spectral, self.leave = conv3(3, 4), nn.Conv2d(8, 8, 1), conv3(4, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.enter(image)
        spectrum = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
        parts = torch.stack((spectrum.real, spectrum.imag), -1).permute(0, 1, 4, 2, 3)
        b, c, _, h, w = parts.shape
        parts = F.relu(self.spectral(parts.reshape(b, -1, h, w))).view(b, c, 2, h, w).permute(0, 1, 3, 4, 2)
        spectrum = torch.complex(parts[..., 0], parts[..., 1])
        return self.leave(x + torch.fft.irfftn(spectrum, s=x.shape[-2:], dim=(-2, -1), norm="ortho"))
