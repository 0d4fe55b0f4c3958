"""Views, permutations, reshapes and slices: dims split, merged, moved, of the sharded dim and of others."""

from __future__ import annotations

from collections.abc import Callable

import einops
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tests.support.oracle import H, case

X = (2, 4, H, 6)
PAIRS = (10, 4)  # heights of several pairs of rows
ONE = (1, 4, H, 6)
IMAGE = (1, H, 6, 4)  # channels last, as windows are cut
IMAGES = (2, H, 6, 4)
EVEN = (10, 4, 2)
FOURS = (8, 4)


def interleave(x: Tensor) -> Tensor:
    """Space to depth by views: each 2×2 block of pixels becomes channels."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


def spread_out(x: Tensor) -> Tensor:
    """Depth to space by views, the inverse."""
    b, c, h, w = x.shape
    return x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, h * 2, w * 2)


def frames(x: Tensor) -> Tensor:
    """(B, T, H, C) as B x H samples of C channels and T frames, as the layers over time of video models take them."""
    return x.permute(0, 2, 3, 1).flatten(0, 1)


def unpacked(x: Tensor) -> Tensor:
    """Rows of 3 tokens, each of which stands for 2×2 pixels of a latent: as FLUX's and Qwen-Image's pipelines do it."""
    b, n, c = x.shape
    return x.view(b, n // 3, 3, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, n // 3 * 2, 6)


def unpacked_clip(x: Tensor) -> Tensor:
    """Two frames of rows of 3 tokens, each of which stands for 2×2 pixels of a latent, as LTX's pipeline does it."""
    b, n, _ = x.shape
    x = x.reshape(b, 2, n // 6, 3, -1, 1, 2, 2).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


BESIDE = (2, 5, 6)


def numbers_of(rows: int) -> Tensor:
    """(2, 3, 6) numbers of tokens."""
    return torch.tensor([0, 6, 4 * rows + 8])[None, :, None].repeat(2, 1, 6)


def between(x: Tensor, y: Tensor) -> Tensor:
    """Tokens (2, 4 H, 6) between others, as text and image tokens are joined."""
    return torch.cat([y, x.flatten(1, 2), y * 2], 1)


def written_between(x: Tensor) -> list[Tensor]:
    """By slices that cut the parts anywhere, and by views of these."""
    y = x * 2
    y[:, 3:7] = 0.5
    y[:, 0] = 3
    y[:, -4:, :2] = y[:, :4, 2:4] * 1
    middle = y[:, 2:6]
    middle.mul_(2)
    return [y, middle]


def written_to(x: Tensor) -> list[Tensor]:
    """By functions along the rows, after which all that is the same tensor has what they wrote."""
    y = x * 2
    same = y
    result = y.cumsum_(1)
    y[:, 1:3] = 0.5
    assert result is same
    return [same + 1, F.relu_(y.index_fill_(1, torch.tensor([0]), -1.0))]


SHAPES = {
    "unpacked tokens": case(unpacked, (2, H, 8), dim=1, heights=(21, 15, 3), p2p=1),
    "unpacked tokens, packed again": case(
        lambda x: unpacked(x).view(2, 2, -1, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, -1, 8),
        (2, H, 8),
        dim=1,
        heights=(21, 15, 3),
        p2p=1,
    ),
    "unpacked tokens of a clip": case(unpacked_clip, (2, H, 8), dim=1, heights=(42, 30, 6), p2p=1),
    "permute": case(lambda x: x.permute(2, 0, 3, 1), X),
    "permute, tuple": case(lambda x: torch.permute(x, (0, 2, 3, 1)), X),
    "transpose": case(lambda x: x.transpose(1, -2).transpose(0, 1), X),
    "mT": case(lambda x: x.mT, X),
    "movedim": case(lambda x: torch.movedim(x, 1, -1) + x.movedim((1, 2, 3), (3, 1, 2)), X),
    "unsqueeze": case(lambda x: x.unsqueeze(0).unsqueeze(-1), X),
    "squeeze": case(lambda x: x.squeeze(1).squeeze(), (2, 1, H, 3), heights=(7, 2)),
    "squeeze the only row": case(lambda x: x.squeeze(2), X, heights=(1, 7)),
    "flatten pixels": case(lambda x: x.flatten(2), X),
    "flatten pixels, transpose, back": case(
        lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (-1, 6)), X, p2p=0
    ),
    "flatten all": case(lambda x: x.flatten(), (1, 1, H, 5), p2p=0),
    "flatten channels and rows": case(lambda x: x.flatten(1, 2), X, heights=(7,)),
    "view": case(lambda x: x.view(2, 2, 2, -1, 3, 2), X, p2p=0),
    "view of tokens": case(lambda x: x.reshape(2, 4, -1), X, p2p=0),
    "view of tokens as pixels": case(lambda x: x.reshape(2, -1, 3, 4), (2, H, 4), heights=(9, 3)),
    "rows in pairs": case(lambda x: x.view(2, 4, -1, 2, 6), X, heights=PAIRS),
    "pairs of rows, merged": case(lambda x: x.reshape(2, 4, -1, 12), X, heights=PAIRS),
    "rows of other width": case(lambda x: x.reshape(2, 4, -1, 4), X, heights=PAIRS),
    "space to depth": case(interleave, X, heights=PAIRS),
    "space to depth, one block": case(interleave, X, heights=(2,)),  # 1 × 2 could be 2 × 1
    "depth to space": case(spread_out, X),
    "rearrange": case(lambda x: rearrange(x, "b (n c) h w -> (b n) h w c", n=2), X),
    "rearrange, pixels as tokens": case(lambda x: rearrange(x, "b c h w -> b (h w) c"), X),
    "rearrange, patches": case(lambda x: rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=2, q=3), X, heights=PAIRS),
    "view_as": case(lambda x, y: x.flatten(2).view_as(y), X, X),
    "expand": case(lambda x: x.expand(2, 3, -1, 5), (2, 1, H, 1)),
    "expand to more dims": case(lambda x: x.expand(2, 4, *x.shape), (3, H, 5)),
    "expand the only row": case(lambda x: x.expand(2, 4, 7, 6), X, heights=(1,)),
    "repeat": case(lambda x: x.repeat(2, 1, 1, 3), X),
    "repeat rows": case(lambda x: x.repeat(1, 1, 2, 1), X),
    "chunk channels": case(lambda x: torch.chunk(x, 2, dim=1), X),
    "chunk rows": case(lambda x: torch.chunk(x, 3, dim=2), X),
    "chunk columns": case(lambda x: x.chunk(2, -1), X),
    "split channels": case(lambda x: x.split([1, 3], dim=1), X),
    "split rows": case(lambda x: x.split(3, dim=-2), X),
    "split rows unevenly": case(lambda x: x.split([1, x.shape[2] - 1], dim=2), X, heights=(7, 3)),
    "tensor_split rows": case(lambda x: torch.tensor_split(x, 3, dim=2), X, heights=(7, 3)),
    "unbind batch": case(lambda x: torch.unbind(x, 0), X),
    "unbind rows": case(lambda x: x.unbind(2), X, heights=(3, 1), fallback="unbind"),
    "cat channels": case(lambda x, y: torch.cat([x, y * 2], dim=1), X, X, sharded=2),
    "cat channels, plain": case(lambda x, y: torch.cat([y, x], 1), X, (2, 1, H, 6)),
    "cat columns": case(lambda x: torch.cat((x, x), dim=-1), X),
    "cat rows": case(lambda x, y: torch.cat([x, y], dim=2), X, X, sharded=2),
    "cat rows, plain": case(lambda x, y: torch.cat([x, y], dim=-2), X, (2, 4, 3, 6)),
    "stack": case(lambda x, y: torch.stack([x, y], dim=1), X, X, sharded=2),
    "stack last": case(lambda x, y: torch.stack([x, y], dim=-1), X, X, sharded=2),
    "narrow rows": case(lambda x: x.narrow(2, 1, 3), X, heights=(7, 4)),
    "narrow columns": case(lambda x: torch.narrow(x, -1, 2, 3), X),
    "select channel": case(lambda x: x.select(1, -1) + x[:, 0], X),
    "select row": case(lambda x: x.select(2, 0) - x[:, :, -1], X),
    "slice columns": case(lambda x: x[..., 1:-2], X),
    "slice channels": case(lambda x: x[:, ::2], X),
    "slice rows": case(lambda x: x[:, :, 2:-1], X, heights=(7, 4)),
    "first rows": case(lambda x: x[:, :, :3], X),
    "last rows": case(lambda x: x[..., -2:, :], X),
    "no rows": case(lambda x: x[:, :, 3:3], X),
    "every second row": case(lambda x: x[:, :, ::2], X),
    "every third row from the second": case(lambda x: x[..., 1::3, :], X),
    "rows and columns interleaved": case(lambda x: x[..., 1::2, ::2] + x[..., ::2, ::2], X, heights=PAIRS),
    "ellipsis and None": case(lambda x: x[None, ..., None, 0], X),
    "a pixel": case(lambda x: x[0, :, 0, 1:3], X),
    "difference of rows": case(lambda x: x[:, :, 1:] - x[:, :, :-1], X, heights=(7, 3)),
    "by index": case(lambda x: x[:, [2, 0]], X),
    "by mask": case(lambda x: x[:, :, torch.arange(x.shape[2]) % 2 == 0], X),
    "flip": case(lambda x: x.flip(2), X),
    "roll": case(lambda x: torch.roll(x, 1, 2), X),
    "width": case(lambda x: x.flatten(0, 1).unflatten(0, (2, 4)).transpose(2, 3), (2, 4, 6, H), dim=-1),
    "width, slice": case(lambda x: x[..., 1:] * x[..., :1], (2, 4, 6, H), dim=-1, heights=(7, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_shape(case: Callable[[], None]) -> None:
    case()


def windows(x: Tensor, size: int) -> Tensor:
    """Swin: (B, H, W, C) to (B * windows, size, size, C)."""
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, c)


def unwindowed(x: Tensor, size: int, h: int, w: int) -> Tensor:
    b = int(x.shape[0] / (h * w / size / size))
    x = x.view(b, h // size, w // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


def swin(x: Tensor, w: Tensor, mask: Tensor | None = None, shift: int = 0) -> Tensor:
    """Attention in (shifted) windows of 2 × 2, and the image again."""
    _, h, width, c = x.shape
    shortcut = x
    x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
    x = windows(x, 2).view(-1, 4, c)
    n = x.shape[0]
    q, k, v = F.linear(x, w).reshape(n, 4, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1)
    if mask is not None:
        count = mask.shape[0]
        scores = scores.view(n // count, count, 2, 4, 4) + mask.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, 2, 4, 4)
    x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, 4, c)
    x = unwindowed(x.view(-1, 2, 2, c), 2, h, width)
    return shortcut + (torch.roll(x, (shift, shift), (1, 2)) if shift else x)


def window_mask(rows: int) -> Tensor:
    return torch.randn(rows // 2 * 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def group_norm_by_hand(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    groups = x.view(b, 2, -1)
    centred = groups - groups.mean(2, keepdim=True)
    return (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).view(b, c, h, w)


def quantize(x: Tensor, book: Tensor) -> Tensor:
    """A VQ layer: the nearest code of each pixel, straight through."""
    z = x.permute(0, 2, 3, 1).contiguous()
    flat = z.view(-1, 4)
    distance = flat.square().sum(1, keepdim=True) + book.square().sum(1) - 2 * F.linear(flat, book)
    chosen = F.embedding(distance.argmin(1), book).view(z.shape)
    return (z + (chosen - z).detach() + 0.1 * chosen).permute(0, 3, 1, 2)


RESHAPES = {
    # Dims in another order.
    "permute": case(lambda x: x.permute(3, 2, 0, 1), X),
    "transpose by name": case(lambda x: torch.transpose(x, dim0=1, dim1=-2), X),
    "swapaxes": case(lambda x: x.swapaxes(0, 2).swapdims(1, 3), X),
    "moveaxis": case(lambda x: torch.moveaxis(x, (0, 2), (-1, 0)), X),
    "T of tokens": case(lambda x: x[0, 0].T + x[0, 1].t(), X),
    "adjoint": case(lambda x: x.adjoint() + x.mH, X),
    "unsqueeze everywhere": case(lambda x: (x.unsqueeze(2), x.unsqueeze(3), x.unsqueeze(-1)), X),
    "squeeze of several": case(lambda x: torch.squeeze(x, (0, -1)), (1, 2, H, 1)),
    "squeeze all": case(lambda x: x.squeeze(), (1, 2, H, 1)),
    "at least": case(lambda x: (torch.atleast_1d(x), *torch.atleast_3d([x, x[0, 0]]), torch.atleast_3d(x[0, :, :, 0].T)), X),
    "broadcast_tensors": case(lambda x, y: torch.broadcast_tensors(x, y), X, (6,)),
    "complex and back": case(lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * 1j), X),
    "real, imag": case(lambda x: torch.complex(x, x * 2).imag + torch.real(torch.complex(x, x)), X),
    "view as bytes": case(lambda x: (x > 0).view(torch.uint8), X),
    # Splits and merges that keep the rows where they are.
    "flatten of the last": case(lambda x: x.flatten(2).unflatten(-1, (-1, 3)), X, p2p=0),
    "unflatten channels": case(lambda x: x.unflatten(1, (2, -1)), X, p2p=0),
    "reshape to the same": case(lambda x: x.reshape(x.shape) * x.view(*x.shape) + x.view_as(x), X, p2p=0),
    "reshape by name": case(lambda x: torch.reshape(x, shape=(2, 2, 2, -1, 6)), X, p2p=0),
    "reshape, ones": case(lambda x: x.reshape(1, 2, 4, 1, -1, 1, 6).reshape(2, 4, -1, 6), X, p2p=0),
    "ravel": case(lambda x: x[:1, :1].ravel(), X, p2p=0),
    "empty": case(lambda x: x[:, :, :0].reshape(2, 4, -1, 3) * 2, X),
    "rows of two": case(lambda x: x.reshape(2, 4, -1, 2, 6).transpose(2, 3), X, heights=EVEN),
    "rows of half": case(lambda x: x.reshape(2, 4, -1, 3), X, p2p=0),
    "space to depth": case(lambda x: einops.rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2), X, heights=EVEN),
    "depth to space": case(lambda x: einops.rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2), X),
    "patches": case(lambda x: einops.rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2), X, heights=EVEN),
    "patches back": case(
        lambda x: einops.rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", w=3, p=2, q=2), (2, H, 8), heights=(6, 12, 3)
    ),
    "frames": case(lambda x: einops.rearrange(x, "(b t) c h w -> b c t h w", t=2).flatten(1, 2), X),
    "heads": case(lambda x: einops.rearrange(x, "b n (h d) -> (b h) n d", h=2) * 2, (2, H, 4)),
    # A dim merged in front of the rows.
    "tokens of the batch": case(lambda x: x.flatten(2).transpose(1, 2).reshape(-1, 4), X, p2p=0),
    "tokens of the batch, linear": case(
        lambda x, w: F.linear(x.permute(0, 2, 3, 1).reshape(-1, 4), w).relu().view(2, -1, 6, 3), X, (3, 4), p2p=0
    ),
    "channels and rows": case(lambda x: x.flatten(1, 2), X, p2p=0),
    "all in one": case(lambda x: x.flatten().exp() + 1, X, p2p=0),
    "all in one, and back": case(lambda x: (x.view(-1) * 2).view(x.shape) + x, X, p2p=0),
    "mean of a sample": case(lambda x: x.reshape(2, -1).mean(1), X, p2p=0),
    "norm of a sample": case(lambda x: x.flatten(1).square().sum(1, keepdim=True).sqrt(), X, p2p=0),
    "group norm by hand": case(group_norm_by_hand, X, p2p=0),
    "var of a group": case(lambda x: x.view(2, 2, -1).var(2), X),
    "merged, added to a plain tensor": case(lambda x, y: x.flatten(1, 2) + y, X, lambda n: torch.ones(4 * n, 1).double()),
    "merged, added to rows": case(lambda x, y: x.flatten(0, 1) + y.flatten(0, 1), X, X, sharded=2),
    "merged, sliced": case(lambda x: x.flatten(1, 2)[:, 1:-1] * 2, X, p2p=0),
    "merged, one chosen": case(lambda x: x.flatten(1, 2)[:, 3], X),
    "merged, cumsum": case(lambda x: x.flatten(1, 2).cumsum(1), X),
    "merged, softmax": case(lambda x: x.flatten(1, 2).softmax(1), X),
    "merged, argmax": case(lambda x: x.flatten(1, 2).argmax(1), X),
    "merged, convolved": case(lambda x, w: F.conv1d(x.flatten(1, 2).transpose(1, 2), w, padding=1), X, (3, 6, 3)),
    "merged, sorted": case(lambda x: x.flatten(1, 2).sort(2).values, X),
    "merged, in place": case(lambda x: (x * 1).flatten(1, 2).mul_(2).sub_(1), X),
    "merged, flipped": case(lambda x: x.flatten(1, 2).flip(1), X),
    "merged, joined": case(lambda x: torch.cat([x.flatten(1, 2), x.flatten(1, 2) * 2], 1), X, p2p=0),
    "merged, joined beside": case(lambda x: torch.cat([x.flatten(1, 2), x.flatten(1, 2) * 2], 2), X, heights=(7, 2), p2p=0),
    "merged, split in another way": case(lambda x: x.flatten(0, 2).view(4, -1, 3), X),
    "merged, cut across": case(lambda x: x.reshape(3, -1), (2, 4, H, 6), heights=(7,), fallback="reshape"),
    "merged, indexed": case(lambda x: x.flatten(1, 2)[:, :, [0, 2]], X),
    "merged, beside rows in order": case(lambda x, y: x.flatten(1, 2) + y.transpose(1, 2).flatten(1, 2), X, X, sharded=2),
    "rows in order beside merged": case(lambda x, y: y.transpose(1, 2).flatten(1, 2) * x.flatten(1, 2), X, X, sharded=2),
    "merged, joined with rows in order": case(lambda x, y: torch.cat([x.flatten(1, 2), y.transpose(1, 2).flatten(1, 2)], 2), X, X, sharded=2),
    "merged, split along the rows": case(lambda x: [t * 2 for t in x.flatten(1, 2).split(5, 1)], X, p2p=0),
    "merged, narrowed along the rows": case(lambda x: x.flatten(1, 2).narrow(1, 1, 4 * x.shape[2] - 2) * 2, X, p2p=0),
    "merged, selected beside the rows": case(lambda x: x.flatten(1, 2).select(2, 1) + x.flatten(1, 2).unbind(2)[0], X, p2p=0),
    "merged, repeated": case(lambda x: x.flatten(1, 2).repeat(1, 2, 1), X),
    "merged, contracted": case(lambda x, w: x.flatten(1, 2).transpose(1, 2) @ w, X, lambda n: torch.ones(4 * n, 2).double()),
    "merged, causal attention": case(lambda x: F.scaled_dot_product_attention(*[x.flatten(1, 2)] * 3, is_causal=True), X),
    "merged, masked attention": case(
        lambda x, m: F.scaled_dot_product_attention(*[x.flatten(1, 2)] * 3, attn_mask=m), X, lambda n: torch.ones(4 * n, 4 * n).double().tril()
    ),
    "merged, group norm": case(lambda x: F.group_norm(x.flatten(0, 2), 2), X),
    "merged, a draw of zeros of its size": case(lambda x: x.flatten(0, 1) + x.flatten(0, 1).new_zeros(x.flatten(0, 1).shape), X),
    "merged, tall matrices": case(lambda x: torch.linalg.vector_norm(x.flatten(1, 2), 2, 1) + x.flatten(1, 2).norm(dim=1), X),
    "merged twice": case(lambda x: x.flatten(1, 2).flatten(0, 1).view(2, 4, -1, 6), X, p2p=0),
    "merged, dropped out": case(lambda x: F.dropout(x.flatten(1, 2), 0.5, training=False), X, p2p=0),
    "merged, layer norm": case(lambda x: F.layer_norm(x.flatten(1, 2), (6,)), X, p2p=0),
    "merged, many blocks": case(lambda x: x.flatten()[::2], (100, 40, H, 1), heights=(3,), worlds=(3,), fallback="reshape"),
    # Where rows stand makes no difference to these: none moves. X merged: (2 H, 6, 4), samples of 6 channels.
    "merged, convolved as samples": case(lambda x, w: F.conv1d(frames(x), w, padding=1), X, (5, 6, 3), p2p=0),
    "merged, convolved by a kernel of one": case(lambda x, w: F.conv2d(x.flatten(1, 2).unsqueeze(1).movedim(-1, 1), w), X, (5, 6, 1, 1), p2p=0),
    "merged, convolved along": case(lambda x, w: F.conv1d(x.flatten(1, 2).transpose(1, 2), w, padding=1), X, (5, 6, 3)),
    "merged, pooled as samples": case(lambda x: F.avg_pool1d(frames(x), 2) + F.max_pool1d(frames(x), 2), X, p2p=0),
    "merged, resized as samples": case(lambda x: F.interpolate(frames(x), scale_factor=2.0), X, p2p=0),
    "merged, padded beside": case(lambda x: F.pad(x.flatten(1, 2), (1, 2), value=3.0), X, p2p=0),
    "merged, padded along": case(lambda x: [F.pad(x.flatten(1, 2), (0, 0, 1, 2)), F.pad(x.flatten(1, 2), (1, 0, 0, 2), value=3.0)], X, p2p=0),
    "merged, mirrored and repeated beside": case(lambda x: x.flatten(1, 2).flip(0, 2).repeat_interleave(2, 2).repeat_interleave(3, dim=0), X, p2p=0),
    "merged, as complex numbers": case(
        lambda x: torch.view_as_real(torch.view_as_complex(x.flatten(1, 2).reshape(2, -1, 3, 2)) * 1j).flatten(2), X, p2p=0
    ),
    "merged, norms and spreads beside": case(
        lambda x: torch.linalg.vector_norm(x.flatten(1, 2), 3, 2) + x.flatten(1, 2).std(2) + x.flatten(1, 2).logsumexp(-1), X, p2p=0
    ),
    "merged, spreads along": case(lambda x: x.flatten(1, 2).var(1) + torch.logsumexp(x.flatten(1, 2), 1), X, p2p=0),
    "merged, ranked beside": case(
        lambda x: [x.flatten(1, 2).argmin(2), x.flatten(1, 2).max(-1)[0], x.flatten(1, 2).sort(2)[0], x.flatten(1, 2).topk(2, 2)[0], x.flatten(1, 2).cumsum(2)], X, p2p=0
    ),
    "merged, ranked along": case(lambda x: [x.flatten(1, 2).argmin(1), x.flatten(1, 2).max(1)[0], x.flatten(1, 2).cumsum(1)], X),
    "merged, written to in order": case(lambda x: written_to(x.flatten(1, 2)), X),
    "merged, distances": case(lambda x, y: torch.cdist(x.flatten(1, 2), y), X, (2, 5, 6), p2p=0),
    "merged, einsum": case(lambda x, w: torch.einsum("bnc,cd->bnd", x.flatten(1, 2), w), X, (6, 3), p2p=0),
    "merged, attended by einsum": case(
        lambda x: torch.einsum("bnm,bmc->bnc", torch.einsum("bnc,bmc->bnm", *[x.flatten(1, 2)] * 2).softmax(-1), x.flatten(1, 2)), X
    ),
    "merged, causal attention of samples": case(
        lambda x: F.scaled_dot_product_attention(*[frames(x)[:, None]] * 3, is_causal=True), X, p2p=0
    ),
    "merged, sampled at": case(lambda x, y: F.grid_sample(y, x.flatten(1, 2).unsqueeze(1)[..., :2].tanh(), align_corners=False), X, (2, 3, 5, 4), p2p=0),
    "merged, beside merged of other rows": case(
        lambda x: x.flatten(1, 2) + F.pad(x, (0, 0, 1, 0))[:, :, 1:].flatten(1, 2), X
    ),
    # Merged rows between others: each tensor is a part of the new rows, and none moves.
    "joined, apart again": case(lambda x, y: [t * 2 for t in between(x, y).split((5, 4 * x.shape[2], 5), 1)], X, BESIDE, p2p=0),
    "joined, pixels again": case(lambda x, y: (between(x, y) * 2)[:, 5:-5].unflatten(1, (4, -1)) + x, X, BESIDE, p2p=0),
    "joined, cut within": case(lambda x, y: [t.exp() for t in between(x, y).chunk(3, 1)], X, BESIDE, p2p=0),
    "joined, one token": case(lambda x, y: [between(x, y)[:, 0], between(x, y)[:, 7]], X, BESIDE),
    "joined twice": case(lambda x, y: torch.cat([between(x, y)[:, 3:], between(x, y)[:, :7].sin()], 1), X, BESIDE, p2p=0),
    "joined, heads": case(lambda x, y: between(x, y).view(2, -1, 2, 3).transpose(1, 2).flatten(0, 1) * 2, X, BESIDE, p2p=0),
    "joined, samples merged": case(lambda x, y: (between(x, y).flatten(0, 1) * 2).view(2, -1, 6), X, BESIDE),
    "joined, normed, projected": case(lambda x, y, w: F.linear(F.layer_norm(between(x, y), (6,)), w), X, BESIDE, (3, 6), p2p=0),
    "joined, attended": case(lambda x, y: F.scaled_dot_product_attention(*[between(x, y)] * 3), X, BESIDE),
    "joined, masked attention": case(
        lambda x, y, m: F.scaled_dot_product_attention(*[between(x, y)] * 3, attn_mask=m), X, BESIDE, lambda n: torch.ones(4 * n + 10, 4 * n + 10).double().tril()
    ),
    "joined, attended by hand": case(lambda x, y: (between(x, y) @ between(x, y).mT).softmax(-1) @ between(x, y), X, BESIDE),
    "joined, causal attention": case(lambda x, y: F.scaled_dot_product_attention(*[between(x, y)] * 3, is_causal=True), X, BESIDE),
    "joined, in order": case(lambda x, y: [between(x, y).cumsum(1), between(x, y)[:, ::3], between(x, y).flip(1)], X, BESIDE),
    "joined, convolved": case(lambda x, y, w: F.conv1d(between(x, y).mT, w, padding=1), X, BESIDE, (3, 6, 3)),
    "joined, ranked": case(lambda x, y: [between(x, y).sort(1)[0], between(x, y).topk(3, 1)[0], between(x, y).argmax(1)], X, BESIDE),
    "joined, reduced": case(lambda x, y: [between(x, y).mean(1), between(x, y).var((1, 2)), between(x, y).softmax(1)], X, BESIDE),
    "joined, chosen by numbers": case(lambda x, y, n: [between(x, y).gather(1, n), between(x, y)[:, n[0, :, 0]]], X, BESIDE, numbers_of),
    "joined, written by numbers": case(lambda x, y, n: between(x, y).scatter_add(1, n, y[:, :3]).index_fill(1, n[0, :, 1], 0.5), X, BESIDE, numbers_of),
    "joined, written to": case(lambda x, y: written_between(between(x, y)), X, BESIDE),
    "joined, beside rows in order": case(lambda x, y: between(x, y) + F.pad(x.transpose(1, 2).flatten(1, 2), (0, 0, 5, 5)), X, BESIDE),
    "joined, beside a plain tensor": case(lambda x, y, z: between(x, y) * z, X, BESIDE, lambda n: torch.ones(4 * n + 10, 1).double()),
    "joined, beside others of its rows": case(
        lambda x, y: between(x, y) * between(F.pad(x, (0, 0, 1, 0))[:, :, 1:], y), X, BESIDE
    ),
    "joined, sampled at": case(lambda x, y, z: F.grid_sample(z, between(x, y).unsqueeze(1)[..., :2].tanh(), align_corners=False), X, BESIDE, (2, 3, 5, 4), p2p=0),
    "quantized": case(quantize, X, (5, 4)),
    "quantized, one image": case(quantize, ONE, (5, 4)),
    # Windows.
    "windows": case(lambda x: windows(x, 2), IMAGE, dim=1, heights=EVEN),
    "windows and back": case(lambda x: unwindowed(windows(x, 2) * 2, 2, x.shape[1], 6), IMAGE, dim=1, heights=EVEN),
    "windows of a batch": case(lambda x: windows(x, 2), IMAGES, dim=1, heights=EVEN),
    "windows of a batch and back": case(
        lambda x: unwindowed(windows(x, 2) * 2, 2, x.shape[1], 6), IMAGES, dim=1, heights=EVEN
    ),
    "windows by columns": case(lambda x: windows(x, 2), (2, 6, H, 4), dim=2, heights=EVEN),
    "swin": case(swin, IMAGE, (12, 4), dim=1, heights=EVEN),
    "swin, shifted": case(lambda x, w: swin(x, w, shift=1), IMAGE, (12, 4), dim=1, heights=EVEN),
    "swin, masked": case(swin, IMAGE, (12, 4), window_mask, dim=1, heights=EVEN),
    "swin of a batch": case(swin, IMAGES, (12, 4), dim=1, heights=EVEN),
    "swin of a batch, shifted, masked": case(
        lambda x, w, m: swin(x, w, m, 1), IMAGES, (12, 4), window_mask, dim=1, heights=EVEN
    ),
    "swin, padded": case(
        lambda x, w: swin(F.pad(x, (0, 0, 0, 0, 0, x.shape[1] % 2)), w)[:, : x.shape[1]], IMAGES, (12, 4), dim=1
    ),
    # einops.
    "einops reduce": case(lambda x: einops.reduce(x, "b c h w -> b c", "mean") + einops.reduce(x, "b c h w -> b c", "max"), X),
    "einops pooling": case(lambda x: einops.reduce(x, "b c (h p) (w q) -> b c h w", "sum", p=2, q=3), X, heights=EVEN),
    "einops repeat": case(lambda x: einops.repeat(x, "b c h w -> b c (h p) (w q)", p=2, q=2), X),
    "einops repeat, tiled": case(lambda x: einops.repeat(x, "b c h w -> b c (p h) w", p=2), X),
    "einops repeat, new": case(lambda x: einops.repeat(x, "b c h w -> b k c h w", k=3), X),
    "einops to one": case(lambda x: einops.rearrange(x, "b c h w -> (h w b) c"), X),
    "einops pack": case(lambda x: einops.pack([x, x[:, :, :, 0]], "b c h *")[0], X),
    "einops asnumpy shape": case(lambda x: x * sum(einops.parse_shape(x, "b c h w").values()), X),
    "expand rows": case(lambda x: x[:, :, :1].expand(2, 4, 5, 6) * 2, X),
    "expand rows of a mean": case(lambda x: x.mean(2, keepdim=True).expand_as(x) - x, X),
    "width": case(lambda x: x.flatten(1, 2).transpose(1, 2).unflatten(1, (-1, 1)), (2, 4, 6, H), dim=-1),
    "width, patches": case(
        lambda x: einops.rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2), (1, 4, 6, H), dim=-1, heights=EVEN
    ),
    "depth": case(lambda x: x.flatten(2).unflatten(2, (-1, 3, 2)), (2, 4, H, 3, 2), dim=2),
}  # fmt: skip


@pytest.mark.parametrize("case", RESHAPES.values(), ids=RESHAPES)
def test_reshape(case: Callable[[], None]) -> None:
    case()
