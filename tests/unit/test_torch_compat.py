"""Names that not every release of torch has: what is done without them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks


@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor")  # where it is the old name
@pytest.mark.parametrize("dim", [2, 3])
def test_gathers_by_their_old_name(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``all_gather_into_tensor`` has no other name before torch 2.13."""
    monkeypatch.delattr(dist, "all_gather_single", raising=False)
    x = random_tensor((2, 4, 7, 5))
    norm = nn.GroupNorm(2, 4).double()
    right = norm(x).argmax(dim)

    def body(rank: int) -> Tensor:
        return distpatch.gather(norm(distpatch.shard(x, dist.group.WORLD, dim=dim)).argmax(dim))

    for found in run_ranks(3, body):
        assert torch.equal(found, right)
