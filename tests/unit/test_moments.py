"""Means and variances taken in chunks of rows, where the last chunk is smaller than the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distpatch.rules.reductions.moments import moments
from distpatch.torch_utils import chunk_sizes
from tests.support.oracle import random_tensor

ROWS, WIDTH, CHANNELS = 11, 5, 6


@pytest.mark.parametrize("rows", [1, 3, 4, 10, 11], ids="of {} rows".format)
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("twice", [False, True], ids=["read once", "read twice"])
@pytest.mark.parametrize(("dims", "groups"), [((2, 3), 0), ((0, 2, 3), 0), ((2, 3, 4), 3)], ids=str)
def test_chunks_of_rows(
    monkeypatch: pytest.MonkeyPatch, dims: tuple[int, ...], groups: int, twice: bool, exact: bool, rows: int
) -> None:
    """Of 100,000 deviations a mean in fp32 is up to 4e-3 off, which is corrected; in one reading it is torch's."""
    corrected = twice or exact
    x = (random_tensor((2, CHANNELS, ROWS, WIDTH)) + (1e5 if corrected else 10)).float()
    sizes = replace(chunk_sizes.BY_KIND["cpu"], statistics_bytes=rows * 2 * CHANNELS * WIDTH * 4, reads_twice=twice)
    monkeypatch.setitem(chunk_sizes.BY_KIND, "cpu", sizes)
    count, mean, m2 = moments(x, dims, 2, "norm", exact, groups)
    whole = x.double().unflatten(1, (groups, -1)) if groups else x.double()
    variance, expected = torch.var_mean(whole, dims, correction=0, keepdim=True)
    assert count == whole.numel() // expected.numel()
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(m2 / count, variance, rtol=1e-5, atol=0)
