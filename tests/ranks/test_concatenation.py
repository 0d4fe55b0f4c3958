"""Rows joined, repeated, rolled, mirrored, cut: along the sharded dim and beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import distpatch
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

X = (2, 3, H, 5)
FLAT = (H, 4)
MANY = (7, 3)
EVEN = (8, 4)


def padded_by_hand(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :1], x, x[:, :, -1:], x[:, :, -1:]], dim=2)


def tiled(x: Tensor) -> Tensor:
    """Two overlapping halves, blended over the rows that both have."""
    half = x.shape[2] // 2
    top, bottom = x[:, :, : half + 1] * 2, x[:, :, half:] * 3
    blend = (top[:, :, -1:] + bottom[:, :, :1]) / 2
    return torch.cat([top[:, :, :-1], blend, bottom[:, :, 1:]], 2)


CASES = {
    "cat rows": case(lambda x, y: torch.cat([x, y], 2), X, X, sharded=2),
    "cat rows thrice": case(lambda x, y: torch.cat((x, y * 2, x.exp()), dim=-2), X, X, sharded=2),
    "cat rows, plain": case(lambda x, y: torch.cat([y, x, y], 2), X, (2, 3, 4, 5)),
    "cat rows, float and double": case(lambda x, y: torch.cat([x.float(), y], 2), X, X, sharded=2, tolerance=1e-6),
    "cat rows of channels_last": case(lambda x, y: torch.cat([x, y], 2), X, X, sharded=2, channels_last=True),
    "cat rows of two dims": case(lambda x, y: torch.cat([x, y.transpose(2, 3)], 2), (2, 3, H, 5), (2, 3, 5, 4), sharded=1),
    "cat of two dims": case(
        lambda x: torch.cat([x, x.transpose(2, 3)], 1) + torch.cat([x.transpose(2, 3), x], 1), (2, 3, 4, 4), heights=(4,)
    ),
    "cat rows of turned": case(lambda x: torch.cat([x, x.transpose(2, 3)], 2), (2, 3, 5, 5), heights=(5,)),
    "cat with nothing": case(lambda x: torch.cat([x.float(), torch.empty(0).double(), x[:, :, :0].float()], 2), X),
    "cat by axis": case(lambda x: torch.concatenate([x, x], axis=1) + torch.concat([x, x], 1), X),
    "cat of slices": case(padded_by_hand, X),
    "cat of tiles": case(tiled, X, heights=(7, 4, 3)),
    "cat batch": case(lambda x, y: torch.cat([x, y], 0), X, (1, 3, H, 5)),
    "stack rows": case(lambda x, y: torch.stack([x, y], 2), X, X, sharded=2),
    "pad_sequence": case(lambda x, y: pad_sequence([x, y[:2], x[1:]], batch_first=True, padding_value=0.5), (H, 5), (3, 5)),
    "pad_sequence, from the left": case(lambda x: pad_sequence([x[1:], x], padding_side="left"), (H, 5)),
    "stack behind rows": case(lambda x, y: torch.stack([x, y], 3).flatten(2, 3), X, X, sharded=2),
    "stack, plain first": case(lambda x, y: torch.stack([y, x]), X, X),
    "hstack": case(lambda x: torch.hstack([x, x * 2]), X),
    "vstack": case(lambda x: torch.vstack([x, x * 2]), FLAT),
    "dstack": case(lambda x: torch.dstack([x, x * 2]), X),
    "column_stack": case(lambda x: torch.column_stack([x, x * 2]), FLAT),
    "repeat": case(lambda x: x.repeat(1, 2, 3, 1), X),
    "repeat of more dims": case(lambda x: x.repeat(2, 1, 1, 2, 1), X),
    "tile": case(lambda x: torch.tile(x, (2, 1)) + x.tile(1, 1, 2, 1), X),
    "repeat never": case(lambda x: x.repeat(1, 1, 0, 1), X),
    "repeat_interleave rows": case(lambda x: x.repeat_interleave(3, dim=2), X),
    "repeat_interleave columns": case(lambda x: torch.repeat_interleave(x, 2, -1), X),
    "repeat_interleave by tensor": case(lambda x: x.repeat_interleave(torch.tensor([1, 0, 2]), 1), X),
    "repeat_interleave rows by tensor": case(
        lambda x: x.repeat_interleave(torch.arange(x.shape[2]), 2), X, fallback="repeat_interleave"
    ),
    "repeat_interleave all": case(lambda x: x.repeat_interleave(2), X, fallback="repeat_interleave"),
    "roll rows": case(lambda x: torch.roll(x, 2, 2), X, p2p=1),
    "roll rows back": case(lambda x: x.roll(-1, -2), X, p2p=1),
    "roll both": case(lambda x: torch.roll(x, shifts=(-1, 2), dims=(2, 3)), X, p2p=1),
    "roll there and back": case(lambda x: x.roll((3, 1), (2, 3)).roll((-3, -1), (2, 3)), X),
    "roll far": case(lambda x: x.roll(100, 2), X),
    "roll columns": case(lambda x: x.roll(1, 3), X, p2p=0),
    "roll nothing": case(lambda x: x.roll(0, 2), X, p2p=0),
    "roll all": case(lambda x: x.roll(1), X, fallback="roll"),
    "flip rows": case(lambda x: x.flip(2), X, p2p=1),
    "flip both": case(lambda x: torch.flip(x, (-1, -2)), X, p2p=1),
    "flip channels": case(lambda x: torch.flip(x, [1]), X, p2p=0),
    "flip by name": case(lambda x: torch.flip(x, dims=(2,)) + x.flip(dims=(0, 2)), X),
    "flipud": case(lambda x: torch.flipud(x) + x.flipud(), FLAT),
    "fliplr": case(lambda x: x.fliplr(), FLAT),
    "rot90": case(lambda x: torch.rot90(x, 1, (2, 3)), X),
    "rot90 twice": case(lambda x: x.rot90(2, (2, 3)) + x.rot90(4, (2, 3)), X),
    "rot90 thrice": case(lambda x: torch.rot90(x, -1, [2, 3]), X),
    "reversed": case(lambda x: reversed(x), FLAT),
    "self-ensemble": case(lambda x: sum(f(f(x) * 2) for f in (lambda t: t.flip(2), lambda t: t.flip(3), lambda t: t)), X),
    "chunk rows": case(lambda x: x.chunk(4, 2), X),
    "split rows by name": case(lambda x: torch.split(x, split_size_or_sections=2, dim=2), X),
    "split with sizes": case(lambda x: x.split_with_sizes([1, x.shape[2] - 1], 2) + torch.split(x, [2, 1], 1), X, heights=MANY),
    "tensor_split": case(lambda x: x.tensor_split([1, 2], -2) + torch.tensor_split(x, 2, dim=3), X),
    "vsplit": case(lambda x: torch.vsplit(x, 2) + x.vsplit([1]), FLAT, heights=EVEN),
    "hsplit": case(lambda x: torch.hsplit(x, 2) + x.hsplit((1, 3)), FLAT),
    "dsplit": case(lambda x: torch.dsplit(x, [1]) + x.dsplit(2), X, heights=EVEN),
    "unbind": case(lambda x: x.unbind(1) + torch.unbind(x, -1), X),
    "unbind rows": case(lambda x: torch.unbind(x, 2), X, heights=(3,), fallback="unbind"),
    "iterate": case(lambda x: [t * i for i, t in enumerate(x)], X),
    "iterate rows": case(lambda x: [row * 2 for row in x], FLAT, heights=(3,), fallback="unbind"),
    "unpack": case(lambda x: torch.addcmul(*x.transpose(0, 1)), X),
    "slices": case(lambda x: x[:, :, 1::2, ::2] * 2 + x[..., :-1:2, 1::2].mean(), X, heights=MANY),
    "diff of rows": case(lambda x: torch.diff(x, dim=2), X, heights=MANY),
    "diff twice": case(lambda x: x.diff(2, 2) * 2, X, heights=MANY),
    "diff of columns": case(lambda x: torch.diff(x), X, p2p=0),
    "diff, prepended": case(lambda x: torch.diff(x, dim=2, prepend=x[:, :, :1], append=x[:, :, -1:]), X),
    "diff of truth": case(lambda x: torch.diff(x > 0, dim=2), X, heights=MANY),
    "total variation": case(lambda x: x.diff(dim=-1).abs().sum() + x.diff(dim=-2).abs().sum(), X, heights=MANY),
    "tril": case(lambda x: x.tril() + torch.triu(x, 1), X),
    "tril of columns": case(lambda x: x.tril(-1) + x.triu(), (2, 3, 4, H), dim=-1),
    "tril in place": case(lambda x: (x * 1).tril_(1), X),
    "tril of a batch": case(lambda x: x.tril(), (H, 3, 3), dim=0),
    "width": case(lambda x: torch.cat([x.flip(-1), x.roll(1, -1), x.repeat(1, 1, 1, 2)], 3), (2, 3, 4, H), dim=-1),
    "narrow": case(lambda x: torch.narrow(x, 2, -2, 1) + x.narrow(-2, 0, 1), X, heights=MANY),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_joining(case: Callable[[], None]) -> None:
    case()


def test_joined_rows_are_shared_evenly() -> None:
    """Whoever had the rows before."""

    def body(rank: int) -> tuple[int, ...]:
        x = distpatch.shard(random_tensor((1, 2, 6, 3)), torch.distributed.group.WORLD, bounds=(0, 6, 6, 6))
        joined = torch.cat([x, x], 2)
        assert isinstance(joined, distpatch.PatchTensor)
        return joined.row_layout.bounds

    assert run_ranks(3, body) == [(0, 4, 8, 12)] * 3


@pytest.mark.parametrize("dim", [1, 3])
def test_shapes_that_do_not_fit(dim: int) -> None:
    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 2, 6, 3)), torch.distributed.group.WORLD)
        with pytest.raises(RuntimeError, match="sizes of tensors must match"):
            torch.cat([x, random_tensor((1, 2, 7, 3))], dim)

    run_ranks(2, body)
