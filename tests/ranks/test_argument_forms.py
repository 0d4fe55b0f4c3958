"""The forms that torch takes arguments in: each gives what it gives on one device, or the same class of error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

X, W = (2, 3, H, 5), (4, 3, 3, 3)
EACH = slice(None)
SOME: dict[str, Any] = {"heights": (7, 4), "worlds": (2, 3)}
one, two, three = (torch.tensor(n) for n in (1, 2, 3))
n1, n2 = np.int64(1), np.int32(2)


def wrote(x: Tensor, index: Any, value: Any) -> Tensor:
    y = x * 1
    y[index] = value
    return y


FORMS: dict[str, Callable[[], None]] = {
    "sequences as indices": case(
        lambda x: [x[[EACH, slice(0, 2)]], x[[Ellipsis, 1]], x[[None, EACH]], x[[EACH, 1, slice(1, 3)]], x[[[0, 1], [1, 2]]],
                   x[[torch.tensor([0, 1]), torch.tensor([0, 2])]], x[[0, 1]], x[[]], x[range(1)], x[([0, 1], [0, 2])]], X, **SOME,
    ),
    "numbers as indices": case(
        lambda x: [x[:, n1], x[:, :, n1], x[:, one], x[:, :, one], x[:, :, n1 : three : n2], x[:, :, one:], x[..., -two, None]], X, **SOME
    ),
    "lists and arrays as indices": case(
        lambda x: [x[:, np.array([0, 2])], x[:, :, np.array([2, 0])], x[:, range(2)], x[:, :, range(2)], x[:, :, [-1, 0]], x[:, [[0, 1], [1, 2]]]],
        X, **SOME,
    ),
    "truth values as indices": case(
        lambda x: [x[[True, False]], x[:, [True, False, True]], x[:, np.array([True, False, True])], x[:, :, [True, False] * (x.shape[2] // 2) + [True] * (x.shape[2] % 2)],
                   x[:, :, torch.arange(x.shape[2]) % 2 == 0]], X, **SOME,
    ),
    "a single truth value": case(lambda x: [x[True], x[:, False], x[torch.tensor(True)]], X, fallback="__getitem__", **SOME),
    "written by any index": case(
        lambda x: [wrote(x, [EACH, slice(0, 2)], 3), wrote(x, (EACH, np.array([0, 2])), 3.0), wrote(x, (EACH, EACH, one), three), wrote(x, (EACH, [[0, 1]]), 2),
                   wrote(x, (EACH, EACH, n1), x[:, :, 0] * 2), wrote(x, (EACH, [True, False, True]), True), wrote(x, (EACH, EACH, [0, 1]), x[:, :, :2] * 2)], X, **SOME,
    ),
    "sizes": case(
        lambda x: [x.view(torch.Size([6, x.shape[2], 5])), x.view([6, -1, 5]), x.view(np.int64(6), -1, torch.tensor(5)), x.view(size=(6, -1, 5)), x.reshape(shape=(6, -1, 5)),
                   x.reshape(np.int64(-1)), torch.reshape(input=x, shape=[6, -1, 5]), x.unflatten(-3, torch.Size([1, -1])), x.flatten(start_dim=2)], X, **SOME,
    ),
    "orders of dims": case(
        lambda x: [x.permute([0, 2, 3, 1]), x.permute(0, -2, n1, -1), x.permute(dims=(0, 2, 3, 1)), torch.permute(x, (0, 2, -1, 1)), x.transpose(dim1=1, dim0=-1),
                   x.swapaxes(axis0=n1, axis1=2), x.movedim((1, 2), (3, 1)), x.movedim(source=1, destination=-1), x.unsqueeze(dim=-n1), x[:, :1].squeeze(dim=n1)], X, **SOME,
    ),
    "repeats": case(
        lambda x: [x[:, :1].expand([-1, 4, -1, -1]), x[:, :1].expand(size=(2, 4, -1, -1)), x.expand(two, -1, -1, -1, -1), x.repeat([1, 2, 1, 1]), x.repeat(1, n2, 2, 1),
                   x.repeat(repeats=(1, 2, 1, 1)), x.tile(two), torch.tile(x, dims=(1, 2)), x.repeat_interleave(2, dim=n2), torch.broadcast_to(x, size=(2, *x.shape))], X, **SOME,
    ),
    "dims of sums": case(
        lambda x: [x.sum((2, 3)), x.sum([2, -1]), x.sum(axis=2), x.sum(axis=(1, 2), keepdims=True), torch.sum(input=x), torch.sum(input=x, dim=n2), x.sum(two), x.sum(None),
                   x.sum(dim=None, keepdim=True), x.sum(dim=()), x.mean((-2, -1), True), x.mean(dim=(n2,)), x.sum(torch.Size([2])), x.logsumexp(two)], X, **SOME,
    ),
    "dims of extremes": case(
        lambda x: [x.max(), x.max(dim=2), x.max(two, True), torch.max(x, axis=2, keepdims=True)[0], torch.max(x, other=x * 2), torch.max(input=x, dim=n2)[1], x.min(-2).values,
                   x.amax((2, 3)), torch.amin(input=x, dim=(1, n2), keepdim=True), torch.aminmax(x.detach(), dim=2), x.argmax(dim=None), torch.argmax(input=x, dim=-2, keepdim=True)], X, **SOME,
    ),
    "deviations": case(
        lambda x: [x.std((2, 3), correction=0), x.std(2, False), x.std(unbiased=False), x.std(False), torch.var(input=x, dim=[n2], unbiased=True, keepdim=True), x.std(axis=2),
                   x.var(2, correction=None), torch.var_mean(x, (0, 2, 3), correction=0), torch.std(x, two, correction=1.5), x.norm(2, n2), torch.norm(x, "fro", [2, 3])], X, **SOME,
    ),
    "scalars": case(
        lambda x: [x + torch.tensor(1.5), np.float64(1.5) * x, x * True, torch.add(x, other=2, alpha=n2), (x * (1 + 2j)).abs(), x ** two, torch.pow(self=2.0, exponent=x),
                   x.clamp(None, 0.3), x.clamp(min=torch.tensor(-1.0).double()), torch.where(x > 0, x, 0.0), torch.where(condition=x > 0, input=x, other=x * 2), x.masked_fill(mask=x > 0, value=two)],
        X, **SOME,
    ),
    "convolutions": case(
        lambda x, w: [F.conv2d(input=x, weight=w, padding=1), F.conv2d(x, w, padding=(1,), stride=(2,)), F.conv2d(x, w, None, [1, 2], [1, 1], [1, 1], 1), F.conv2d(x, w, padding="same"),
                      F.conv2d(x, w, padding="valid"), F.conv2d(x, w, bias=w[:, 0, 0, 0], padding=n1), F.conv2d(x, w, padding=torch.Size([1, 1])), F.conv2d(x, w, padding=one),
                      F.conv_transpose2d(input=x, weight=w.transpose(0, 1), stride=(2, 2), output_padding=[1, 1]), F.conv_transpose2d(x, w.transpose(0, 1), stride=(2,), output_padding=(1,))],
        X, W, **SOME,
    ),
    "pools": case(
        lambda x: [F.max_pool2d(x, [2], stride=[]), F.max_pool2d(input=x, kernel_size=3, stride=1, padding=1), F.max_pool2d(x, n2, return_indices=True)[0], F.avg_pool2d(input=x, kernel_size=(2,), stride=[]),
                   F.avg_pool2d(x, kernel_size=3, stride=one, padding=(1,), ceil_mode=True), F.adaptive_avg_pool2d(x, (None, 2)), F.adaptive_max_pool2d(input=x, output_size=[2, 2])], X, **SOME,
    ),
    "resizing": case(
        lambda x: [F.interpolate(x, 6), F.interpolate(x, size=torch.Size([6, 7])), F.interpolate(x, size=(torch.tensor(6), np.int64(7))), F.interpolate(x, size=torch.tensor(6)),
                   F.interpolate(x, scale_factor=(2, 1.5)), F.interpolate(x, scale_factor=np.float64(2)), F.interpolate(input=x, scale_factor=[2, 2], mode="bilinear")], X, **SOME,
    ),
    "padding": case(
        lambda x: [F.pad(x, [1, 1, 1, 1]), F.pad(x, (1, 1, 1, 1), "reflect"), F.pad(input=x, pad=(0, 0, 1, 2), mode="constant", value=2), F.pad(x, torch.Size([1, 1, 1, 1])),
                   F.pad(x, [n1] * 4), F.pad(x, (one, 1, 1, 1), value=two)], X, **SOME,
    ),
    "conversions": case(
        lambda x: [x.to("cpu", torch.float64), x.to(torch.zeros(1).double()), x.to(torch.float64, copy=True), x.type(torch.float64), x.type("torch.DoubleTensor"), x * len(x.type()),
                   x.type_as(torch.zeros(1).double()), x.to(memory_format=torch.channels_last), torch.zeros(1).double().to(x) + x], X, **SOME,
    ),
    "joined and split": case(
        lambda x: [torch.cat(tensors=[x, x], dim=n2), torch.cat((x, x), axis=2), torch.stack(tensors=(x, x), dim=-1), *x.split([one, two], 1), *torch.split(tensor=x, split_size_or_sections=2, dim=two),
                   *x.split(split_size=2, dim=1), *x.chunk(chunks=2, dim=-2), *x.tensor_split((1, 2), dim=two), *x.unbind(dim=one), x.flip(np.int64(-2)), x.roll(n1, n2), x.select(dim=one, index=-1)], X, **SOME,
    ),
    "products": case(
        lambda x: [torch.einsum("bchw,bcHw->bhH", [x, x]), torch.einsum(x, [0, 1, 2, 3], x, [0, 1, 4, 3], [0, 2, 4]), torch.einsum(x, [Ellipsis, 0, 1], [Ellipsis, 1, 0]),
                   torch.matmul(input=x, other=x.mT), torch.bmm(input=x[:, 0], mat2=x[:, 0].mT), torch.bucketize(input=x.detach(), boundaries=torch.zeros(1).double())], X, **SOME,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:torch.searchsorted")
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    FORMS[name]()


ERRORS: dict[str, Callable[[Tensor], object]] = {
    "a dim out of range": lambda x: x.cumsum(4),
    "softmax of no dim": lambda x: x.softmax(-5),
    "flip of no dim": lambda x: x.flip(4),
    "unsqueeze beyond": lambda x: x.unsqueeze(6),
    "select beyond": lambda x: x.select(4, 0),
    "sum of a dim twice": lambda x: x.sum((2, 2)),
    "a dim that is no number": lambda x: x.sum(2.5),
    "a fraction as size": lambda x: x.view(2.5, -1),
    "sizes that do not fit": lambda x: x.view(7, -1, 11),
    "permute too few": lambda x: x.permute(0, 1),
    "a mask too long": lambda x: x[:, :, [True] * 9],
    "a row beyond": lambda x: x[:, :, [0, 9]],
    "a numbered row beyond": lambda x: x[:, :, torch.tensor([0, 9])],
    "an index of fractions": lambda x: x[torch.tensor(0.5)],
    "too many indices": lambda x: x[0, 0, 0, 0, 0],
    "an unknown name": lambda x: torch.bmm(input=x[0], matrix=x[0]),
    "cat of no dim": lambda x: torch.cat([x, x], 4),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    """What torch refuses is refused by the same class of error."""
    x = random_tensor((2, 3, 7, 5))
    with pytest.raises(Exception) as plain:
        ERRORS[name](x)

    def body(rank: int) -> None:
        with pytest.raises(plain.type):
            ERRORS[name](distpatch.shard(x, dist.group.WORLD))

    run_ranks(2, body)
