"""``LivePeak``: bytes of tensors alive at once, counted by hand."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

import distpatch
from distpatch.profiling.live_memory import MIB, LivePeak
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks

KB = 1024


def kilobytes(n: int) -> torch.Tensor:
    return torch.zeros(n * KB, dtype=torch.uint8)


def test_peak_and_its_operation() -> None:
    with LivePeak() as live:
        a = kilobytes(4)
        b = a + 1
        assert live.live_bytes == 8 * KB
        del a
        assert live.live_bytes == 4 * KB
        c = torch.cat([b, b])
        assert live.live_bytes == live.peak_bytes == 12 * KB
        del b
    assert (live.peak_bytes, live.live_bytes) == (12 * KB, 8 * KB)
    assert live.peak_op == f"aten.cat.default {(8 * KB,)}"
    assert live.peak_mib == 12 * KB / MIB
    del c
    assert live.live_bytes == 0


def test_views_and_writes_add_nothing() -> None:
    with LivePeak() as live:
        a = kilobytes(4)
        views = [a.view(2, -1), a[:KB], a.add_(1), a.detach()]
        assert live.live_bytes == live.peak_bytes == 4 * KB
        del a
        assert live.live_bytes == 4 * KB, "the views hold the memory"
        del views
        assert live.live_bytes == 0


def test_what_was_there_before_is_left_out_unless_given() -> None:
    weight, given = kilobytes(16), kilobytes(2)
    with LivePeak(given) as live:
        result = weight[:KB] + given[:KB]
        weight.mul_(2)
        live.count(given)  # once, however often
        assert live.peak_bytes == 3 * KB
    del given, result
    assert live.live_bytes == 0


def test_a_resized_storage() -> None:
    with LivePeak() as live:
        a = kilobytes(1)
        a.resize_(4 * KB)
        assert live.live_bytes == 4 * KB
        a.resize_(KB)
        assert live.peak_bytes == 4 * KB


def test_gradients_are_counted() -> None:
    x = random_tensor((KB,)).requires_grad_()
    with LivePeak() as live:
        y = (x * 2).exp()  # saves its result
        y.sum().backward()
        assert x.grad is not None
        assert live.live_bytes >= 16 * KB
        assert live.peak_bytes >= 24 * KB


def test_a_sharded_tensor_is_counted_by_the_rows_of_the_rank() -> None:
    x = random_tensor((1, 4, 9, 8))

    def body(rank: int) -> tuple[int, int]:
        rows = distpatch.shard(x, dist.group.WORLD)
        with LivePeak() as live:
            y = F.silu(rows)
            assert live.live_bytes == y.local.nbytes
            live.count(rows)
            return live.live_bytes - y.local.nbytes, live.peak_bytes

    row_bytes = 4 * 8 * 8
    results = run_ranks(2, body)
    assert [peak for _, peak in results] == [x.nbytes + 5 * row_bytes, x.nbytes + 4 * row_bytes]
