"""``x[...] = y`` and its kin: written to rows, to views of them and to plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from tests.support.makers import MANY, X, anywhere, mask, numbers
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

LEFT, RIGHT = (..., slice(0, 2)), (..., slice(2, None))


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
    changed_row(y)
    y[:, :, 1:].add_(1)
    y.detach().clamp_(max=6)
    return y


def changed_row(y: Tensor) -> Tensor:
    """Twice the same one: its owner alone has it."""
    row = y[0, :, 0]
    row[1:].mul_(3)
    row[0] = 7
    return y


def changed_data(x: Tensor) -> Tensor:
    """Past autograd, which then knows of no change."""
    y = (x.detach() * 1).contiguous()
    y[:, :, 0].data.mul_(2)
    y[:, :, -1].data[:, 0].zero_()
    y.data[:, :, 1:].add_(1)
    y.view(2, 3, -1, 10).data.mul_(3)
    y.unbind(1)[0].data.sub_(1)
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


FRAMES = (2, 3, H, 4)


def scattered_tokens(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Into rows of frames, which stand one after the other as tokens."""
    return x.flatten(1, 2).scatter_add(1, index, values)


def turned_in_pairs(x: Tensor) -> Tensor:
    """Rotary embedding as diffusers writes it: into an empty tensor, every second channel."""
    tokens = x.flatten(1, 2)
    out = torch.empty_like(tokens)
    out[..., 0::2] = tokens[..., 0::2] * 2 - tokens[..., 1::2]
    out[..., 1::2] = tokens[..., 1::2] * 2 + tokens[..., 0::2]
    return out


def chosen_columns(x: Tensor) -> Tensor:
    tokens = x.flatten(1, 2) * 1
    tokens[..., [0, 3]] = tokens[..., [1, 2]] * 3
    tokens[torch.tensor([False, True])] = 1.5
    return tokens


def packed(x: Tensor, text: Tensor) -> Tensor:
    """One sequence of tokens of two kinds, in places that numbers say."""
    places = torch.arange(x.shape[1] + text.shape[1]).flip(0)
    sequence = text.new_zeros(2, len(places), 5).index_copy(1, places[: text.shape[1]], text)
    return sequence.index_copy(1, places[text.shape[1] :], x) * 2


def packed_in_place(x: Tensor, text: Tensor) -> Tensor:
    places = torch.arange(x.shape[1] + text.shape[1]).flip(0)
    sequence = torch.zeros(2, len(places), 5, dtype=x.dtype)
    sequence.index_copy_(1, places[: text.shape[1]], text.detach())
    sequence.index_add_(1, places[text.shape[1] :], x)
    return sequence * 2


def packed_by_mask(x: Tensor, text: Tensor) -> Tensor:
    is_image = torch.tensor([False, True, False, *[True] * (x.shape[1] - 1), False])
    sequence = torch.zeros(2, len(is_image), 5, dtype=x.dtype)
    sequence[:, is_image] = x
    sequence[:, ~is_image] = text
    return sequence * 2


def packed_on_text(x: Tensor, text: Tensor) -> Tensor:
    """Into a sequence that has a gradient already."""
    sequence = torch.cat([text * 2, text.new_zeros(2, x.shape[1], 5)], 1)
    sequence[:, torch.arange(sequence.shape[1]) >= 3] = x
    assert type(sequence) is type(x)
    return sequence * 2


def filled_under_a_view(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=x.dtype)
    first = out[0]
    out[:] = x.detach()
    return out + first


def filled_numpy(x: Tensor) -> Tensor:
    array = np.zeros(x.shape)
    torch.from_numpy(array)[:] = x.detach()
    return torch.from_numpy(array)


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
    "changed row, channels_last": case(in_place(changed_row), X, channels_last=True),
    "changed data": case(changed_data, X, heights=(8, 2)),
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
    "scatter rows": case(lambda x, i, v: x.scatter_add(2, i, v), X, numbers(2, 3, H, 5, below=1), X),
    "scatter_add rows, all sharded": case(lambda x, i, v: x.scatter_add(2, i, v), X, anywhere(2, 3, H, 5), X, sharded=3),
    "scatter_reduce_ rows": case(
        in_place(lambda y, i, v: y.scatter_reduce_(2, i, v, reduce="mean", include_self=False)), X, anywhere(2, 3, 4, 5), (2, 3, 4, 5)
    ),
    "scatter a number to rows": case(lambda x, i: x.scatter(2, i, 2.0), X, anywhere(2, 3, 2, 5)),
    "scatter_add merged rows": case(scattered_tokens, FRAMES, lambda h: numbers(2, 3 * h, 4, below=3 * h)(h), lambda h: random_tensor((2, 3 * h, 4))),
    "merged rows in pairs": case(turned_in_pairs, FRAMES),
    "merged rows by mask": case(chosen_columns, FRAMES),
    "index_add merged rows": case(lambda x, v: x.flatten(1, 2).index_add(1, torch.tensor([2, 0]), v), FRAMES, (2, 2, 4), heights=MANY),
    "packed": case(packed, (2, H, 5), (2, 3, 5), dim=1),
    "packed in place": case(packed_in_place, (2, H, 5), (2, 3, 5), dim=1),
    "packed on text": case(packed_on_text, (2, H, 5), (2, 3, 5), dim=1),
    "packed by mask": case(packed_by_mask, (2, H, 5), (2, 3, 5), dim=1),
    "plain frames by number": case(
        filled(((slice(None), [2, 0, 1]), lambda x: x), make=lambda x: torch.ones(2, 4, *x.shape[2:], dtype=x.dtype)), X
    ),
    "rows by mask, values": case(
        written(lambda x, m: (slice(None), slice(None), m), lambda x, m: random_tensor((2, 3, int(m.sum()), 5))), X, mask(H)
    ),
    "one hot of the best": case(lambda x: torch.zeros_like(x).scatter_(1, x.argmax(1, keepdim=True), 1.0) * x, X),
    "select_scatter": case(lambda x, v: x.select_scatter(v[:, 0], 1, 2), X, X, sharded=2),
    "select_scatter rows": case(lambda x, v: torch.select_scatter(x, v, dim=2, index=0), X, (2, 3, 5)),
    "slice_scatter": case(lambda x: x.slice_scatter(x[:, :, 1:] * 2, dim=2, start=1), X, heights=MANY),
    "width": case(lambda x: written((..., 0), 1.0)(x) + x[..., [0, -1]].sum(-1, keepdim=True), (2, 3, 4, H), dim=-1),
}  # fmt: skip


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


@pytest.mark.parametrize("name", ["scatter_add", "index_add"])
def test_a_place_that_does_not_exist(name: str) -> None:
    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((2, 5, 3)), dist.group.WORLD)
        places = torch.tensor([0, 5])
        index = places.view(1, 2, 1).expand(2, 2, 3) if name == "scatter_add" else places
        with pytest.raises((IndexError, RuntimeError), match="out of (bounds|range)"):
            getattr(x, name)(1, index, torch.ones(2, 2, 3).double())

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
