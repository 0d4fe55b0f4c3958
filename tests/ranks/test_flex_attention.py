"""``flex_attention`` with masks and scores that ask for positions. torch has no backward pass of it on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from distpatch.rules.linalg import flex_attention as attention
from tests.support.oracle import H, case

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
TOKENS = (1, 2, H, 4)
FRAMES = (1, 2, 3, H, 4)


def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() < 3


def sloped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score - 0.1 * (q - k).abs()


def attend(score_mod: Any = None, mask_mod: Any = None, frames: bool = False) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        query, key, value = (t.detach().flatten(2, 3) if frames else t.detach() for t in tensors)
        mask = None
        if mask_mod is not None:
            mask = flex.create_block_mask(mask_mod, None, None, query.shape[2], key.shape[2], query.device)
        out = flex.flex_attention(query, key, value, score_mod=score_mod, block_mask=mask, scale=0.3)
        return out.unflatten(2, (3, -1)) if frames else out

    return run


CASES = {
    "plain": case(attend(), *[TOKENS] * 3, sharded=3, heights=(7,), worlds=(2,)),
    "masked, fewer rows than ranks": case(
        attend(mask_mod=near), *[TOKENS] * 3, sharded=3, heights=(7, 2), worlds=(3,)
    ),
    "scores, plain keys": case(attend(sloped), *[TOKENS] * 3, heights=(5,), worlds=(2,)),
    "rows of frames": case(
        attend(sloped, near, frames=True), *[FRAMES] * 3, sharded=3, heights=(5,), worlds=(2, 3)
    ),
}  # fmt: skip


def blocks_of_tokens(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Blocks of keys chosen by what the tokens are, as NABLA does (Kandinsky 6 SR)."""
    query, key, value = query.detach(), key.detach(), value.detach()
    means = query.unflatten(2, (-1, 2)).mean(-2) @ key.unflatten(2, (-1, 2)).mean(-2).mT
    order = means.argsort(-1, descending=True).int()
    count = (means > 0).sum(-1).int()
    mask = flex.BlockMask.from_kv_blocks(torch.zeros_like(count), order, count, order, BLOCK_SIZE=2)
    return flex.flex_attention(query, key, value, block_mask=mask)


def test_blocks_that_are_found_from_tokens() -> None:
    case(blocks_of_tokens, *[TOKENS] * 3, sharded=3, heights=(6, 10), worlds=(2, 3))()


def test_blocks_count_where_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own function without torch.compile asks ``mask_mod`` alone; compiled kernels leave out other blocks."""
    chosen = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    order = chosen.argsort(dim=-1, descending=True, stable=True).int().view(1, 1, 3, 3)
    count = chosen.sum(-1).int().view(1, 1, 3)
    some = flex.BlockMask.from_kv_blocks(count, order, 0 * count, order, BLOCK_SIZE=2, mask_mod=near)
    full = flex.BlockMask.from_kv_blocks(0 * count, order, count, order, BLOCK_SIZE=2, mask_mod=near)
    blocks = chosen.bool().repeat_interleave(2, 0).repeat_interleave(2, 1)
    close = (torch.arange(6)[:, None] - torch.arange(6)).abs() < 3

    def seen(mask: flex.BlockMask) -> Tensor:
        visible = attention._seen_by(mask)
        return flex.create_mask(visible, 1, 1, 6, 6, "cpu")[0, 0]

    assert torch.equal(seen(some), close)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(seen(some), blocks & close)
    assert torch.equal(seen(full), blocks)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flex(case: Callable[[], None]) -> None:
    case()
