"""``flex_attention`` with masks and scores that ask for positions. torch has no backward pass of it on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.nn.attention import flex_attention as flex

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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flex(case: Callable[[], None]) -> None:
    case()
