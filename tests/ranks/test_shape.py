"""Shape changes: views, permutations, slices, concatenation, on the sharded dim and beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tests.support.oracle import H, case

X = (2, 4, H, 6)
EVEN = (10, 4)  # heights of several pairs of rows


def interleave(x: Tensor) -> Tensor:
    """Space to depth by views: each 2×2 block of pixels becomes channels."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


def spread_out(x: Tensor) -> Tensor:
    """Depth to space by views, the inverse."""
    b, c, h, w = x.shape
    return x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, h * 2, w * 2)


CASES = {
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
    "rows in pairs": case(lambda x: x.view(2, 4, -1, 2, 6), X, heights=EVEN),
    "pairs of rows, merged": case(lambda x: x.reshape(2, 4, -1, 12), X, heights=EVEN),
    "rows of other width": case(lambda x: x.reshape(2, 4, -1, 4), X, heights=EVEN),
    "space to depth": case(interleave, X, heights=EVEN),
    "space to depth, one block": case(interleave, X, heights=(2,)),  # 1 × 2 could be 2 × 1
    "depth to space": case(spread_out, X),
    "rearrange": case(lambda x: rearrange(x, "b (n c) h w -> (b n) h w c", n=2), X),
    "rearrange, pixels as tokens": case(lambda x: rearrange(x, "b c h w -> b (h w) c"), X),
    "rearrange, patches": case(lambda x: rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=2, q=3), X, heights=EVEN),
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
    "rows and columns interleaved": case(lambda x: x[..., 1::2, ::2] + x[..., ::2, ::2], X, heights=EVEN),
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_shape(case: Callable[[], None]) -> None:
    case()
