"""Patch Conv against the plain convolution: one rank's rows, its halo pieces, any patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from distpatch.layout.rows import RowLayout
from distpatch.layout.stencil import WindowStencil
from distpatch.layout.transfers import RankPlan, plan_rank
from distpatch.lazy.patch_plan import Share, choose_patch_rows, cut_rows
from distpatch.lazy.row_patches import Slab, compute_now
from distpatch.rules.core.halo import paddings
from tests.support.oracle import random_tensor
from tests.unit.test_layout import bounds_of
from tests.unit.test_stencil import windows


@dataclass
class Options:
    splits: int | str = 1
    min_numel: int = 0
    workspace_bytes: int | None = None


def share(x: Tensor) -> Share:
    """All of an image, from which one as large is made."""
    return Share(x.shape[2], x.numel(), x.numel(), x.element_size(), "cpu", torch.is_grad_enabled())


def slabs(x: Tensor, bounds: tuple[int, ...], stencil: WindowStencil) -> Iterator[tuple[Slab, RankPlan]]:
    """What each rank would hold after the exchange, and its share of the output."""
    for rank in range(len(bounds) - 1):
        plan = plan_rank(RowLayout(2, bounds), stencil, rank)
        above, below = plan.needs[rank]
        pieces = tuple((lo, x[:, :, lo:hi]) for lo, hi in (above, bounds[rank : rank + 2], below))
        yield Slab(pieces, 1, 2, x.shape[2]), plan


@given(bounds_of(most_rows=14, most_ranks=4), windows, st.integers(1, 12), st.booleans(), st.booleans(), st.booleans())
def test_convolve(
    bounds: tuple[int, ...], stencil: WindowStencil, patch_rows: int, sequential: bool, grad: bool, nhwc: bool
) -> None:
    """The ranks' outputs together are the convolution of the padded image, whatever the patches."""
    rows = bounds[-1]
    assume(rows > 0 and stencil.out_rows(rows) > 0)
    x = random_tensor((2, 3, rows, 4))
    if nhwc:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = random_tensor((4, 3, stencil.kernel, 3), seed=1).requires_grad_(grad)
    options = {"stride": (stencil.stride, 1), "dilation": (stencil.dilation, 1)}

    def conv(rows: Tensor, start: int, lo: int, hi: int) -> Tensor:
        pads = paddings([stencil, WindowStencil(3, before=1, after=1)], 0, start, lo)
        return F.conv2d(rows, weight, padding=pads, **options)

    right = F.conv2d(F.pad(x, (1, 1, stencil.before, stencil.after)), weight, **options)
    with torch.set_grad_enabled(grad):
        outputs = [
            compute_now(conv, slab, cut_rows(stencil, plan, patch_rows, share(x), pads=True, together=not sequential))
            for slab, plan in slabs(x, bounds, stencil)
        ]
    torch.testing.assert_close(torch.cat(outputs, 2), right, rtol=1e-12, atol=1e-12)
    assert grad == all(out.requires_grad for out in outputs)


def test_slab_rows() -> None:
    """Own rows are a view; beyond the image are zeros; halo pieces join their neighbours."""
    x = torch.arange(1.0, 11.0).view(1, 1, 10, 1)
    slab = Slab(((2, x[:, :, 2:4]), (4, x[:, :, 4:7]), (7, x[:, :, 7:8])), 1, 2, 10)
    assert slab.own[:2] == (4, 7)
    assert slab.rows(5, 7).data_ptr() == x[:, :, 5:].data_ptr()
    assert slab.rows(2, 8).flatten().tolist() == [3, 4, 5, 6, 7, 8]
    edge = Slab(((0, x[:, :, :0]), (7, x[:, :, 7:]), (10, x[:, :, :0])), 1, 2, 10)
    assert edge.rows(8, 13).flatten().tolist() == [9, 10, 0, 0, 0]
    assert edge.rows(11, 13).flatten().tolist() == [0, 0]


@pytest.mark.parametrize(("splits", "rows", "patch"), [(1, 9, 9), (3, 9, 3), (4, 9, 3), (100, 9, 1), (2, 1, 1)])
def test_splits(splits: int, rows: int, patch: int) -> None:
    assert choose_patch_rows(Options(splits), share(torch.zeros(1, 1, rows, 4)), 9) == patch


def test_never_more_elements_than_an_index_can_count() -> None:
    """Of the output too: 4 GiB elements are at least three calls, asked for or not."""
    x = share(torch.empty(1, 1, 64, 2, device="meta"))._replace(out_numel=2**32)
    assert choose_patch_rows(Options(1), x, 9) == 64 // 3 + 1
    assert choose_patch_rows(Options(8), x, 9) == 8
    large = torch.empty(1, 2**20, 64, 64, device="meta")
    assert choose_patch_rows(Options(1), share(large)._replace(out_numel=8), 9) == 64 // 3 + 1


def test_automatic_splits_only_where_they_pay() -> None:
    """As many as keep a call's input and output in the budget, not more; without gradients, and no light patches."""
    x = torch.zeros(1, 8, 64, 16)

    def rows(weights: int, budget: int, recorded: bool = False) -> int:
        part = share(x)._replace(recorded=recorded)
        return choose_patch_rows(Options("auto", workspace_bytes=budget), part, weights)

    assert rows(64, x.nbytes) == 32  # input and output: two of these
    assert rows(64, x.nbytes // 2) == 16
    assert rows(64, x.nbytes // 2 - 1) == 13
    assert rows(64, 2 * x.nbytes) == 64
    assert rows(64, 3 * x.nbytes // 2) == 64  # a rest of a third is not worth a call
    assert rows(64 * 8 * 81, 1) == 64
    assert rows(64, 1, recorded=True) == 64
    assert choose_patch_rows(Options(4, x.numel()), share(x), 64) == 16
    assert choose_patch_rows(Options(4, x.numel() + 1), share(x), 64) == 64
