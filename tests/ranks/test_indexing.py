"""``x[...]`` read and written: numbers, slices, lists, tensors, masks; gather, scatter and their kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

X = (2, 3, H, 5)
LEFT, RIGHT = (..., slice(0, 2)), (..., slice(2, None))
FLAT = (H, 4)
MANY = (7, 3)


def numbers(*shape: int, below: int) -> Callable[[int], Tensor]:
    """An input of whole numbers; H stands for the rows."""

    def make(rows: int) -> Tensor:
        sizes = tuple(rows if n == H else n for n in shape)
        return torch.randint(below, sizes, generator=torch.Generator().manual_seed(5))

    return make


def anywhere(*shape: int) -> Callable[[int], Tensor]:
    """Numbers of rows."""
    return lambda rows: numbers(*shape, below=rows)(rows)


def mask(*shape: int) -> Callable[[int], Tensor]:
    draw = numbers(*shape, below=2)
    return lambda rows: draw(rows).bool()


def written(index: Any, value: Any = 2.5) -> Callable[..., Tensor]:
    """``x[index] = value`` on a copy; value may be a function of the inputs."""

    def run(x: Tensor, *others: Tensor) -> Tensor:
        y = x * 1
        at = index(x, *others) if callable(index) else index
        y[at] = value(x, *others) if callable(value) else value
        return y

    return run


def in_place(change: Callable[..., object]) -> Callable[..., Tensor]:
    def run(x: Tensor, *others: Tensor) -> Tensor:
        y = x * 1
        change(y, *others)
        return y

    return run


def increased(x: Tensor) -> Tensor:
    """``y[...] += value`` reads a view, changes it in place, and writes it back."""
    y = x * 1
    y[:, :, 0] += 1
    y[:, 1] *= 2
    y[:, :, 1:] -= 0.5
    y[:, :, -1, 2:] *= x[:, :, 0, 2:]
    y[y > 1] *= 3
    return y


def changed_views(x: Tensor) -> Tensor:
    """Views of a tensor are changed in place, each in its own way; the tensor changes with them."""
    y = x * 1
    y[:, :, 0].mul_(2)
    y.select(2, -1).add_(x[:, :, 0])
    y.narrow(2, 0, 1).add_(2)
    y.transpose(1, 2)[:, 0].sub_(1)
    y.view(2, 3, -1).mul_(0.5)
    y.flatten(0, 1).neg_()
    row = y[0, :, 0]
    row[1:].mul_(3)
    row[0] = 7
    y[:, :, 1:].add_(1)
    y.detach().clamp_(max=6)
    return y


def moved_view(x: Tensor) -> Tensor:
    """Rows of two have to move before they can be seen as one; what is written to them comes back."""
    y = (x * 1).contiguous()
    y.view(2, 3, -1, 10).mul_(2).add_(1)
    y.reshape(2, 3, -1, 2, 5)[:, :, :, 0].sub_(3)
    return y


def canvas(x: Tensor) -> Tensor:
    """Tiles written into one image, as tiled decoding does."""
    out = torch.zeros_like(x)
    weight = torch.zeros_like(x)
    step = max(x.shape[2] // 2, 1)
    for start in range(0, x.shape[2], step):
        tile = x[:, :, start : start + step + 1] * 2
        out[:, :, start : start + step + 1] += tile
        weight[:, :, start : start + step + 1] += 1
    return out / weight


def on_plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """A replicated canvas and a replicated mask take all rows."""
    out = torch.zeros(2, 3, x.shape[2] + 2, 5, dtype=x.dtype)
    out[:, :, 1:-1] = x * 2
    out[:, 0, 0] = x[:, 1].sum(1)
    seen = torch.ones(2, x.shape[2], 5, dtype=torch.bool)
    seen[:, :, 1:] = x[:, 0, :, 1:] > 0
    return out, seen


def filled(*parts: tuple[Any, Callable[[Tensor], Tensor]], make: Callable[[Tensor], Tensor] | None = None) -> Any:
    """A plain tensor of the caller's own, filled with rows: (index, value) one after the other."""

    def run(x: Tensor) -> Tensor:
        out = make(x) if make else torch.zeros(x.shape, dtype=x.dtype)
        for index, value in parts:
            out[index] = value(x)
        return out * 2

    return run


def filled_under_a_view(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=x.dtype)
    first = out[0]
    out[:] = x.detach()
    return out + first


def filled_numpy(x: Tensor) -> Tensor:
    array = np.zeros(x.shape)
    torch.from_numpy(array)[:] = x.detach()
    return torch.from_numpy(array)


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

WRITTEN = {
    "a number everywhere": case(written(slice(None)), X),
    "a row": case(written((slice(None), slice(None), 0)), X),
    "the last row": case(written((..., -1, slice(1, 3))), X),
    "a row, a tensor": case(written((slice(None), slice(None), 0), lambda x, v: v), X, (2, 3, 5)),
    "a row, broadcast": case(written((slice(None), slice(None), 0), lambda x, v: v), X, (3, 1)),
    "a row, a column": case(written((0, slice(None), 0), lambda x, v: v), X, (5,)),
    "a row, of another": case(written((..., 0, slice(None)), lambda x: x[:, :, -1] * 2), X),
    "a pixel": case(written((0, 1, 0, 2), 9), X),
    "a channel": case(written((slice(None), 1), lambda x, v: v[:, 0]), X, X, sharded=2),
    "a channel, plain": case(written((slice(None), 1), lambda x, v: v[:, 0]), X, X),
    "a channel, broadcast": case(written((slice(None), 1), lambda x, v: v), X, (5,)),
    "rows": case(written((..., slice(1, None), slice(None)), lambda x: x[:, :, :-1]), X),
    "rows, plain": case(written((..., slice(1, None), slice(None)), lambda x, v: v[:, :, 1:]), X, X),
    "rows, one for all": case(written((..., slice(1, None), slice(None)), lambda x: x[:, :, :1]), X),
    "every second row": case(written((..., slice(None, None, 2), slice(None))), X),
    "every second row, sharded": case(written((..., slice(1, None, 2), slice(None)), lambda x: x[:, :, 1::2] * 3), X),
    "no rows": case(written((..., slice(3, 3), slice(None))), X),
    "new dims": case(written((None, ..., 1), lambda x: x[None, ..., 0]), X),
    "leading ones": case(written((0, 0), lambda x, v: v), X, (1, 1, H, 5)),
    "by mask": case(written(lambda x: x > 0), X),
    "by plain mask": case(written(lambda x, m: m), X, mask(2, 3, H, 5)),
    "by mask of the first dims": case(written(lambda x, m: m), X, mask(2, 3)),
    "by mask with rows": case(written(lambda x, m: m, lambda x, m: torch.ones(5).double()), X, mask(2, 3, H)),
    "by mask, a tensor": case(written(lambda x: x > 0, lambda x: x.sum()), X),
    "by mask, values": case(written(lambda x, m: m, lambda x, m: torch.arange(int(m.sum())).double()), X, mask(2, 3, H, 5)),
    "by mask, rows of values": case(
        written(lambda x, m, v: m, lambda x, m, v: v[: int(m.sum())]), X, mask(2, 3), (6, H, 5)
    ),
    "by mask, what was there": case(
        written(lambda x: x > 0, lambda x: x[x > 0] * 2), X, fallback="__getitem__"
    ),
    "masked_scatter": case(lambda x, m, v: x.masked_scatter(m, v), X, mask(2, 3, H, 5), (2, 3, H, 5), sharded=2),
    "masked_scatter_": case(in_place(lambda y, m, v: y.masked_scatter_(m, v)), X, mask(3, H, 1), (2, 3, H, 5)),
    "masked_fill_": case(in_place(lambda y, m: y.masked_fill_(m, 3.0)), X, mask(H, 5)),
    "channels by list": case(written((slice(None), [2, 0])), X),
    "channels by tensor": case(written(lambda x, i, v: (slice(None), i), lambda x, i, v: v), X, lambda _: torch.tensor([2, 0]), (2, 2, H, 5)),
    "channels by tensor, sharded": case(
        written(lambda x, i: (slice(None), i), lambda x, i: x[:, :2] * 2), X, lambda _: torch.tensor([2, 0])
    ),
    "channels of some rows": case(written((slice(None), [2, 0], slice(1, None)), lambda x: x[:, :2, 1:] * 2), X),
    "batch and columns": case(written(([0, 1], slice(None), slice(None), [2, 4]), lambda x: x[:, :, :, 0]), X),
    "rows by list": case(written((..., [0, -1], slice(None))), X, heights=MANY),
    "rows by tensor": case(
        written((..., torch.tensor([1, 0]), slice(None)), lambda x, v: v), X, (2, 3, 2, 5), heights=MANY
    ),
    "filled by columns": case(filled((LEFT, lambda x: x[LEFT]), (RIGHT, lambda x: x[RIGHT] * 3)), X),
    "filled by samples": case(
        filled((0, lambda x: x), (2, lambda x: x[None] * 2), make=lambda x: torch.ones(4, *x.shape, dtype=x.dtype)), X
    ),
    "filled between": case(
        filled(((..., slice(1, -1), slice(None)), lambda x: x), make=lambda x: x.detach().new_ones(2, 3, x.shape[2] + 2, 5)), X
    ),
    "filled between, plain": case(
        filled(((..., slice(1, -1), slice(None)), lambda x: x), make=lambda x: torch.ones(2, 3, x.shape[2] + 2, 5).double()), X
    ),
    "filled under a view": case(filled_under_a_view, X),
    "filled, memory of numpy": case(filled_numpy, X),
    "increased": case(increased, X, heights=(7, 2), fallback="__getitem__"),
    "changed views": case(changed_views, X, heights=(7, 2)),
    "moved view": case(moved_view, X, heights=(8, 4, 2)),
    "canvas": case(canvas, X),
    "on plain": case(on_plain, X),
    "index_put_": case(in_place(lambda y: y.index_put_((torch.tensor([0, 1]), torch.tensor([2, 0])), torch.ones(5).double())), X),
    "index_put": case(lambda x, m: torch.index_put(x, (m,), torch.tensor(2.0).double()), X, mask(2, 3, H, 5)),
    "index_fill": case(lambda x: x.index_fill(1, torch.tensor([0, 2]), 1.0), X),
    "index_fill rows": case(lambda x: x.index_fill(2, torch.tensor([0, -1]), 1.0), X),
    "index_fill_ rows": case(in_place(lambda y: y.index_fill_(2, torch.tensor([-1]), 4)), X),
    "index_add": case(lambda x, v: x.index_add(1, torch.tensor([0, 2]), v, alpha=2), X, (2, 2, H, 5), sharded=2),
    "index_add rows": case(lambda x, v: x.index_add(2, torch.tensor([1, 0, 1]), v), X, (2, 3, 3, 5), heights=MANY),
    "index_add_ rows": case(in_place(lambda y, v: y.index_add_(2, torch.tensor([0, 0]), v[:, :, :2])), X, X, sharded=2, heights=MANY),
    "index_copy": case(lambda x, v: torch.index_copy(x, 3, torch.tensor([4]), v), X, (2, 3, H, 1)),
    "index_copy rows": case(lambda x, v: x.index_copy(2, torch.tensor([1, 0]), v), X, (2, 3, 2, 5), heights=MANY),
    "scatter": case(
        lambda x, v: x.scatter(1, torch.tensor([2, 0]).view(1, 2, 1, 1).expand(2, 2, x.shape[2], 5), v), X, (2, 2, H, 5)
    ),
    "scatter a number": case(lambda x, i: torch.scatter(x, 1, i, value=2.0), X, numbers(2, 3, H, 5, below=3), sharded=2),
    "scatter_": case(in_place(lambda y, i: y.scatter_(3, i, 1.5)), X, numbers(2, 3, H, 2, below=5)),
    "scatter_add": case(lambda x, i, v: x.scatter_add(1, i, v), X, numbers(2, 4, H, 5, below=3), (2, 4, H, 5), sharded=3),
    "scatter_reduce": case(
        lambda x, i, v: x.scatter_reduce(3, i, v, reduce="amax"), X, numbers(2, 3, H, 5, below=5), X, sharded=3
    ),
    "scatter rows": case(lambda x, i, v: x.scatter_add(2, i, v), X, numbers(2, 3, H, 5, below=1), X, fallback="scatter_add"),
    "one hot of the best": case(lambda x: torch.zeros_like(x).scatter_(1, x.argmax(1, keepdim=True), 1.0) * x, X),
    "select_scatter": case(lambda x, v: x.select_scatter(v[:, 0], 1, 2), X, X, sharded=2),
    "select_scatter rows": case(lambda x, v: torch.select_scatter(x, v, dim=2, index=0), X, (2, 3, 5)),
    "slice_scatter": case(lambda x: x.slice_scatter(x[:, :, 1:] * 2, dim=2, start=1), X, heights=MANY),
    "width": case(lambda x: written((..., 0), 1.0)(x) + x[..., [0, -1]].sum(-1, keepdim=True), (2, 3, 4, H), dim=-1),
}  # fmt: skip


@pytest.mark.parametrize("case", READ.values(), ids=READ)
def test_read(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("case", WRITTEN.values(), ids=WRITTEN)
def test_written(case: Callable[[], None]) -> None:
    case()


LOST: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda x: torch.real(x.unbind(2)[0]).add_(1),
    "mul_": lambda x: x.diagonal(0, 2, 3).mul_(2),
    "flatten": lambda x: x.flatten(1, 2)[:, :3].zero_(),
    "__getitem__": lambda x: x.flatten(1, 2).__setitem__((0, 1), 0.0),
}


@pytest.mark.parametrize("name", LOST)
def test_what_would_be_lost_is_refused(name: str) -> None:
    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD)
        x.region.warned.update({"unbind", "diagonal"})
        before = x.local.clone()
        with pytest.raises((distpatch.UnsupportedOpError, RuntimeError)):
            LOST[name](x)
        assert torch.equal(x.local, before)

    run_ranks(2, body)


def test_a_view_is_not_read_after_its_source_changed() -> None:
    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD)
        row = x[:, :, 0]
        assert torch.equal(row * 1, random_tensor((1, 2, 5, 3))[:, :, 0])
        x.mul_(2)
        with pytest.raises(distpatch.UnsupportedOpError, match="out of date"):
            row + 1
        assert torch.equal(x[:, :, 0] * 1, random_tensor((1, 2, 5, 3))[:, :, 0] * 2)

    run_ranks(2, body)


def test_no_view_outlives_the_gather() -> None:
    """A single row leaves as a plain tensor."""

    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD)
        assert type(distpatch.gather([x[:, :, 0]])[0]) is Tensor
        assert type(x[:, :, 0] + 1) is Tensor

    run_ranks(2, body)


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


class Counted(nn.Module):
    """Keeps the last image in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(2, 3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.last[:] = x
        return self.last * 2


def test_buffers_stay_plain() -> None:
    x = random_tensor((2, 3, 5, 4), dtype=torch.float32)

    def body(rank: int) -> tuple[Tensor, Tensor]:
        model = distpatch.convert_model(Counted(), dist.group.WORLD, fallback="allow")
        return model(x), model.last

    for result, last in run_ranks(2, body):
        assert type(last) is Tensor
        assert torch.equal(last, x)
        assert torch.equal(result, x * 2)
