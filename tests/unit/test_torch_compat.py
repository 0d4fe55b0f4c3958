"""Names that not every release of torch has: what is done without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from distpatch import torch_compat
from tests.oracle import random_tensor
from tests.threads import run_ranks


@pytest.fixture
def before_2_12(monkeypatch: pytest.MonkeyPatch) -> None:
    """``new_group`` always sorts ranks, and ``all_gather_into_tensor`` has no other name."""
    right = dist.new_group

    def new_group(ranks: list[int], **options: Any) -> Any:
        assert "sort_ranks" not in options
        return right(ranks, **options)

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(torch_compat, "KEEPS_ORDER", False)
    monkeypatch.delattr(dist, "all_gather_single", raising=False)


@pytest.mark.usefixtures("before_2_12")
@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor")  # where it is the old name
@pytest.mark.parametrize("dim", [2, 3])
def test_gathers_and_groups_by_their_old_names(dim: int) -> None:
    x = random_tensor((2, 4, 7, 5))
    norm = nn.GroupNorm(2, 4).double()
    right = norm(x).argmax(dim)

    def body(rank: int) -> Tensor:
        group = torch_compat.new_group([0, 1, 2])
        return distpatch.gather(norm(distpatch.shard(x, group, dim=dim)).argmax(dim))

    for found in run_ranks(3, body):
        assert torch.equal(found, right)


@pytest.mark.usefixtures("before_2_12")
@pytest.mark.parametrize("order", [[1, 0], [2, 0, 1], [0, 2, 1]], ids=str)
def test_ranks_in_another_order_are_refused(order: list[int]) -> None:
    with pytest.raises(distpatch.RankError, match=r"stand in the order \[.*use torch 2.12"):
        torch_compat.new_group(order)
