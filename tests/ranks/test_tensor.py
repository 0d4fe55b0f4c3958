"""``PatchTensor``, ``shard`` and ``gather``: a global tensor of which each rank holds its rows."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from distpatch import LayoutError, PatchTensor, RowLayout
from distpatch.profiling.live_memory import LivePeak
from distpatch.torch_utils import chunk_sizes
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks, turned_group

X = random_tensor((2, 3, 7, 5))


def test_tensors_of_different_groups_do_not_meet() -> None:
    """Also where the bounds are the same."""

    def body(rank: int) -> None:
        turned = turned_group()
        x = random_tensor((2, 3, 6, 5))
        one, other = distpatch.shard(x, dist.group.WORLD), distpatch.shard(x, turned)
        for meet in (
            lambda: one + other,
            lambda: one.add_(other),
            lambda: torch.where(one > 0, one, other),
            lambda: torch.cat([one, other], 1),
            lambda: torch.cat([one, other], 2),
            lambda: one @ other.mT,
            lambda: torch.einsum("bchw,bchv->bwv", one, other),
            lambda: F.scaled_dot_product_attention(one, other, other),
        ):
            with pytest.raises(LayoutError, match="different groups"):
                meet()
        assert torch.equal(distpatch.gather(one), distpatch.gather(other))

    run_ranks(2, body)


def test_what_it_says_of_itself() -> None:
    def body(rank: int) -> None:
        x = distpatch.shard(X, dist.group.WORLD)
        assert isinstance(x, Tensor)
        assert x.shape == x.size() == X.shape and x.size(-2) == 7 and len(x) == 2
        assert (x.dim(), x.ndim, x.numel(), x.dtype, x.device) == (4, 4, X.numel(), X.dtype, X.device)
        assert x.is_floating_point() and not x.is_complex() and not x.is_cuda and x.is_leaf
        assert x.row_layout == RowLayout(2, (0, 3, 5, 7))
        assert x.group is dist.group.WORLD
        assert torch.equal(x.local, X[:, :, slice(*x.row_layout.interval(rank))])
        assert x.stride() == X.stride() and (x * 1).is_contiguous()
        assert f"rank={rank}" in repr(x) and "bounds=(0, 3, 5, 7)" in repr(x)
        assert {x: 1}[x] == 1
        assert torch.result_type(x, torch.tensor(1, dtype=torch.int8)) == X.dtype

    run_ranks(3, body)


def test_shard_is_a_view_and_needs_no_communication() -> None:
    def body(rank: int) -> None:
        distpatch.warmup(dist.group.WORLD)
        with distpatch.trace() as t:
            x = distpatch.shard(X, dist.group.WORLD)
        assert not t.records
        assert x.local.untyped_storage().data_ptr() == X.untyped_storage().data_ptr()

    run_ranks(2, body)


def test_from_local() -> None:
    """Rows that are distributed already are adopted, not copied; without bounds the ranks exchange counts."""
    counts = [2, 0, 4, 1]

    def body(rank: int) -> Tensor:
        start = sum(counts[:rank])
        local = X[:, :, start : start + counts[rank]]
        asked = PatchTensor.from_local(local, dist.group.WORLD)
        told = PatchTensor.from_local(local, dist.group.WORLD, bounds=(0, 2, 2, 6, 7))
        assert asked.row_layout == told.row_layout == RowLayout(2, (0, 2, 2, 6, 7))
        assert asked.local is local and told.local is local
        return distpatch.gather(asked + told)

    for result in run_ranks(4, body):
        assert torch.equal(result, 2 * X)


@pytest.mark.parametrize(
    ("bounds", "dim", "words"),
    [
        ((0, 3, 6), -2, r"do not cover 7 rows"),
        ((0, 7), -2, r"do not cover 7 rows on 2 ranks"),
        ((0, 8, 7), -2, r"never fall"),
        (None, 4, r"dim 4 is out of range .*\(2, 3, 7, 5\)"),
        (None, -5, r"dim -5 is out of range"),
    ],
)
def test_layouts_that_do_not_fit(bounds: tuple[int, ...] | None, dim: int, words: str) -> None:
    def body(rank: int) -> None:
        with pytest.raises(LayoutError, match=words):
            distpatch.shard(X, dist.group.WORLD, dim=dim, bounds=bounds)
        with pytest.raises(LayoutError, match=f"rank {rank} owns rows"):
            PatchTensor.from_local(X, dist.group.WORLD, bounds=(0, 3, 7))

    run_ranks(2, body)


def test_ranks_whose_rows_do_not_fit_together() -> None:
    def body(rank: int) -> None:
        with pytest.raises(distpatch.RankError, match="called differently"):
            PatchTensor.from_local(X[:, :, :, : 5 - rank], dist.group.WORLD)

    run_ranks(2, body)


def test_gather_reaches_into_structures() -> None:
    def body(rank: int) -> None:
        x = distpatch.shard(X, dist.group.WORLD)
        tree = {"a": [x, "text"], "b": (x * 2, X)}
        gathered = distpatch.gather(tree)
        assert torch.equal(gathered["a"][0], X) and gathered["a"][1] == "text"
        assert torch.equal(gathered["b"][0], 2 * X) and gathered["b"][1] is X
        assert distpatch.gather(X) is X

    run_ranks(2, body)


def test_gradients_of_a_leaf() -> None:
    """A sharded leaf accumulates the rows of its gradient."""

    def body(rank: int) -> None:
        x = distpatch.shard(X.clone(), dist.group.WORLD)
        assert x.requires_grad_() is x and x.requires_grad
        distpatch.gather(x.square()).sum().backward()
        assert isinstance(x.grad, PatchTensor) and x.grad.row_layout == x.row_layout
        assert torch.equal(x.grad.local, 2 * x.local.detach())
        y = x * 3
        y.backward(X)
        assert torch.equal(distpatch.gather(x.grad), 2 * X + 3 * X)

    run_ranks(3, body)


def test_alone() -> None:
    """Without a group: one rank owns all rows, and nothing is initialised."""
    x = distpatch.shard(X, None)
    assert x.row_layout.bounds == (0, 7)
    assert torch.equal(distpatch.gather(x.relu().mean((2, 3))), X.relu().mean((2, 3)))


def test_channels_last() -> None:
    """Strides of the global tensor follow the memory order of the rows."""
    nhwc = X.contiguous(memory_format=torch.channels_last)

    def body(rank: int) -> None:
        x = distpatch.shard(nhwc, dist.group.WORLD) * 1
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        assert x.stride() == nhwc.stride() and x.stride(1) == 1
        assert distpatch.gather(x).is_contiguous(memory_format=torch.channels_last)
        assert x.contiguous().is_contiguous() and distpatch.gather(x.contiguous()).is_contiguous()

    run_ranks(2, body)


def test_conversions() -> None:
    case(lambda x: x.to("cpu", torch.float64).double().to(x), (2, 3, H, 5))()
    case(lambda x: x.half().to(torch.float32), (2, 3, H, 5), tolerance=1e-3)()


def test_deepcopy() -> None:
    """Of a module that holds one, or of a cache."""

    def body(rank: int) -> None:
        x = distpatch.shard(X, dist.group.WORLD)
        again = copy.deepcopy(x)
        assert again.row_layout == x.row_layout and torch.equal(again.local, x.local) and again.local is not x.local

    run_ranks(2, body)


@pytest.mark.parametrize(
    "shape, dim", [((2, 3, 7, 5), -2), ((1, 7, 3, 4), 1), ((2, 8, 7, 1), -2), ((7, 5, 6), 0), ((2, 7), 1)]
)
@pytest.mark.parametrize("format", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("ranks", [3, 6])
def test_gather_in_parts(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dim: int, format: str, ranks: int
) -> None:
    """A large tensor is gathered a part at a time: same values, strides and gradients, also of shards of one row."""
    full = random_tensor(shape)
    if format == "channels_last":
        full = full.contiguous(memory_format=torch.channels_last) if full.ndim == 4 else full
    elif format == "transposed":
        full = full.mT.contiguous().mT

    def body(rank: int) -> list[Tensor]:
        x = distpatch.shard(full.clone().requires_grad_(), dist.group.WORLD, dim=dim)
        result = distpatch.gather(x * 2)
        (grad,) = torch.autograd.grad((result * full).sum(), x)
        moved = distpatch.shard(full, dist.group.WORLD, dim=dim).movedim(0, -1)
        return [result, distpatch.gather(grad), distpatch.gather(moved)]

    at_once = run_ranks(ranks, body)
    monkeypatch.setitem(chunk_sizes.BY_KIND, "cpu", replace(chunk_sizes.BY_KIND["cpu"], bucket_bytes=200))
    for mine, (result, grad, moved) in zip(at_once, run_ranks(ranks, body)):
        assert torch.equal(result, 2 * full) and torch.equal(grad, 2 * full) and torch.equal(moved, full.movedim(0, -1))
        assert [t.stride() for t in mine] == [result.stride(), grad.stride(), moved.stride()]


def test_gather_holds_one_part_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunk_sizes.BY_KIND, "cpu", replace(chunk_sizes.BY_KIND["cpu"], bucket_bytes=1 << 14))
    full = random_tensor((1, 16, 32, 64))

    def body(rank: int) -> int:
        x = distpatch.shard(full, dist.group.WORLD)
        with LivePeak() as live:
            distpatch.gather(x)
        return live.peak_bytes

    assert max(run_ranks(2, body)) <= full.nbytes + 2 * (1 << 14)
