"""Tensors made like a sharded one, and randomness with the values of one device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from tests.oracle import H, case, random_tensor
from tests.threads import run_ranks

X = (2, 3, H, 5)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


CASES = {
    "zeros_like": case(lambda x: torch.zeros_like(x) + x, X),
    "ones_like": case(lambda x: torch.ones_like(x, dtype=torch.float32), X),
    "full_like": case(lambda x: torch.full_like(x, 2.5) * x, X),
    "empty_like": case(lambda x: torch.empty_like(x).copy_(x), X),
    "randn_like": case(lambda x: x + torch.randn_like(x, generator=generator()), X),
    "rand_like": case(lambda x: x * torch.rand_like(x, generator=generator()), X),
    "randn of its shape": case(lambda x: x * torch.randn(x.shape, generator=generator()), X),
    "new_zeros of its shape": case(lambda x: x + x.new_zeros(x.shape), X),
    "new_full": case(lambda x: x + x.new_full((1, 3, 1, 1), 2.0), X),
    "new_tensor": case(lambda x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0]), X),
    "dropout of nothing": case(lambda x: F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0), X),
    "channels_last": case(lambda x: torch.zeros_like(x) + x, X, channels_last=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_creation(case: Callable[[], None]) -> None:
    case()


def test_random_from_the_global_generator() -> None:
    """A seeded run draws the numbers of the single device: here one rank, which shares no generator."""
    x = random_tensor((1, 3, 5, 4))
    torch.manual_seed(3)
    right = torch.randn_like(x)

    def body(rank: int) -> Tensor:
        torch.manual_seed(3)
        return distpatch.gather(torch.randn_like(distpatch.shard(x, dist.group.WORLD)))

    assert torch.equal(run_ranks(1, body)[0], right)


def test_dropout_in_training_is_one_mask() -> None:
    """Dropout is gathered: whatever the mask, all ranks have rows of the same one."""
    x = torch.ones(1, 2, 8, 16)

    def body(rank: int) -> Tensor:
        torch.manual_seed(3)
        return distpatch.gather(F.dropout(distpatch.shard(x, dist.group.WORLD), 0.5))

    with pytest.warns(UserWarning, match="no sharded rule for dropout"):
        (result,) = run_ranks(1, body)
    torch.manual_seed(3)
    assert torch.equal(result, F.dropout(x, 0.5))
