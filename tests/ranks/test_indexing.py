"""``x[...]`` read: numbers, slices, lists, tensors, masks; gather, embedding and their kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from tests.support.makers import MANY, X, anywhere, mask, numbers
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks


def joined_tokens(x: Tensor, text: Tensor) -> Tensor:
    """Some tokens of a text, chosen by a mask, beside an image's: as MochiTransformer3DModel attends."""
    both = torch.cat([x, text], 1)
    image, words = both.split_with_sizes((x.shape[1], 4), 1)
    mask = torch.tensor([True, True, False, True])
    chosen = torch.nonzero(mask.flatten(), as_tuple=False).flatten()
    return torch.cat([image, words[:, chosen, :], words[:, mask]], 1)


def chosen_text(x: Tensor) -> Tensor:
    """What came of one row is replicated: its mask, and where it is true, are local."""
    row = x[0, :, 0]
    mask = row > 0
    return row[mask].sum() + torch.masked_select(row, mask).sum() * x + mask.nonzero().sum()


READ = {
    "numbers and slices": case(lambda x: x[1, ..., 2:] + x[0, :, :, :3], X),
    "None": case(lambda x: x[:, None, :, :, None, 0], X),
    "Ellipsis": case(lambda x: x[..., 0] + x[0, ..., 1], X),
    "a row": case(lambda x: x[:, :, -1] * x[..., 0, :], X),
    "a pixel of a row": case(lambda x: x[0, 1, 0, 2], X),
    "a row, then a part of it": case(lambda x: x[:, :, 0][:, 1:].relu(), X),
    "a number of numpy": case(lambda x: x[torch.tensor(1).numpy()[()]], X),
    "a range of slices": case(lambda x: torch.stack([x[:, :, i : i + 2].sum() for i in range(x.shape[2])]), X),
    "channels by list": case(lambda x: x[:, [2, 0, 2]], X),
    "channels by tensor": case(lambda x, i: x[:, i], X, numbers(4, below=3)),
    "channels by tensor of two dims": case(lambda x, i: x[:, i] * 2, X, numbers(2, 2, below=3)),
    "channels by mask": case(lambda x: x[:, torch.tensor([True, False, True])] + x[:, [False, True, True]], X),
    "batch and channels": case(lambda x: x[[0, 1, 1], [2, 0, 1]], X),
    "batch and columns": case(lambda x: x[[0, 1, 1], :, :, [2, 0, 4]], X),
    "batch and channels by mask": case(lambda x, m: x[m], X, mask(2, 3)),
    "columns behind a slice of rows": case(lambda x, i: x[:, 1, 1:, i], X, numbers(3, below=5), heights=MANY),
    "a number between": case(lambda x: x[0, :, :, [2, 0, 4]], X),
    "columns, new dim": case(lambda x: x[:, None, :, :, [0, 0]], X),
    "rows by list": case(lambda x: x[:, :, [0, -1, 0]] * 2, X),
    "rows by long list": case(lambda x: x[:, :, list(range(x.shape[2])) * 3], X),
    "rows by range": case(lambda x: x[:, :, range(x.shape[2] - 1, -1, -1)], X),
    "rows by tensor": case(lambda x, i: x[:, :, i], X, numbers(4, below=1)),
    "rows by sharded numbers": case(lambda x, i: x[i[:, 0]] * 2, (H, 5), anywhere(H, 2), sharded=2),
    "merged rows by sharded numbers": case(
        lambda x, i: x.flatten(0, 1)[i.flatten()], (3, H, 2), lambda h: numbers(3, h, 2, below=3 * h)(h), sharded=2
    ),
    "rows by many numbers": case(lambda x, i: x[:, :, i], X, numbers(9, below=1)),
    "rows by negative numbers": case(lambda x: x[:, :, torch.tensor([-1, 0, -1])], X),
    "rows of slices by numbers": case(lambda x, i: x[1:, 1, i, ::2], X, numbers(5, below=1)),
    "rows by a table": case(lambda x, i: x[:, :, i, :], X, numbers(2, 3, below=1)),
    "rows by a mask": case(lambda x: x[:, 1:, torch.arange(x.shape[2]) > 1], X),
    "channels by a mask": case(lambda x: x[:, torch.tensor([True, False, True])], X),
    "rows by numbers, then joined": case(joined_tokens, (2, H, 3), (2, 4, 3), dim=1),
    "a mask of what is replicated": case(chosen_text, X),
    "index_select of many rows": case(lambda x, i: x.index_select(2, i), X, numbers(9, below=1)),
    "rows and columns by tensors": case(lambda x: x[:, :, [0], [1]], X),
    "by mask": case(lambda x: x[x > 0], X, fallback="__getitem__"),
    "by sharded numbers": case(lambda i, t: t[i] * 2, numbers(2, H, 3, below=4), (4, 6)),
    "columns of a table by sharded numbers": case(lambda i, t: t[:, i], numbers(2, H, 3, below=4), (6, 4)),
    "embedding": case(lambda i, t: F.embedding(i, t) * 2, numbers(2, H, 3, below=4), (4, 6)),
    "embedding, padded": case(lambda i, t: F.embedding(i, t, padding_idx=1), numbers(2, H, 3, below=4), (4, 6)),
    "one_hot": case(lambda i: F.one_hot(i, 4), numbers(2, H, 3, below=4)),
    "one_hot of how many": case(lambda i: F.one_hot(i), numbers(2, H, 3, below=4), heights=(7,)),
    "index_select": case(lambda x, i: torch.index_select(x, 1, i), X, numbers(4, below=3)),
    "index_select rows": case(lambda x, i: x.index_select(2, i), X, numbers(2, below=1)),
    "gather": case(lambda x, i: torch.gather(x, 1, i), X, numbers(2, 3, H, 5, below=3), sharded=2),
    "gather, plain index": case(lambda x, i: x.gather(3, i), X, numbers(2, 3, H, 2, below=5)),
    "gather, fewer channels": case(lambda x, i: x.gather(3, i), X, numbers(1, 2, H, 7, below=5)),
    "gather, fewer rows": case(lambda x, i: x.gather(3, i[:, :, 1:]), X, numbers(2, 3, H, 5, below=5), sharded=2),
    "gather of plain": case(lambda i, x: x.gather(1, i), numbers(2, 2, H, 5, below=3), X),
    "gather of plain rows": case(lambda i, x: x.gather(2, i), numbers(2, 2, H, 5, below=4), (2, 3, 4, 5)),
    "gather rows": case(lambda x, i: x.gather(2, i), X, anywhere(2, 3, 4, 5)),
    "gather rows, fewer columns": case(lambda x, i: x.gather(2, i) * 2, X, anywhere(1, 3, 9, 2)),
    "gather rows, numbers": case(lambda x, i: (x * 9).long().gather(2, i), X, anywhere(2, 3, 4, 5)),
    "gather rows, truths": case(lambda x, i: (x > 0).gather(2, i), X, anywhere(2, 3, 4, 5)),
    "gather rows, as many": case(lambda x, i: x.gather(2, i), X, numbers(2, 3, H, 5, below=1)),
    "gather rows, sharded index": case(lambda x, i: x.gather(2, i), X, numbers(1, 2, H, 3, below=1), sharded=2),
    "gather rows, any sharded index": case(lambda x, i: x.gather(2, i), X, anywhere(2, 3, H, 5), sharded=2),
    "take_along_dim": case(lambda x, i: torch.take_along_dim(x, i, dim=1), X, numbers(1, 2, H, 1, below=3), sharded=2),
    "take_along_dim, for all rows": case(lambda x, i: x.take_along_dim(i, 1), X, numbers(2, 1, 1, 5, below=3)),
    "sorted by hand": case(lambda x: x.take_along_dim(x.argsort(1), 1), X),
    "masked_select": case(lambda x: x.masked_select(x > 0), X, fallback="masked_select"),
    "nonzero": case(lambda x: (x > 0).nonzero(), X, fallback="nonzero"),
    "where of one": case(lambda x: torch.where(x > 0), X, fallback="where"),
    "take": case(lambda x: torch.take(x, torch.tensor([0, 3])), X, fallback="take"),
}  # fmt: skip


@pytest.mark.parametrize("case", READ.values(), ids=READ)
def test_read(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("index", [5, -6, (0, 0, 7), (..., [0, 9], slice(None))])
def test_out_of_range(index: Any) -> None:
    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD)
        with pytest.raises(IndexError):
            x[index]

    run_ranks(2, body)


def test_numbers_out_of_range_are_refused() -> None:
    """By every rank, as on one device: they are nobody's rows."""
    x = random_tensor((2, 3, 7, 5))

    def body(rank: int) -> None:
        for number in (7, -1):
            with pytest.raises(RuntimeError, match="out of bounds"):
                distpatch.shard(x, dist.group.WORLD).gather(2, torch.full((2, 3, 1, 5), number))

    run_ranks(3, body)
