"""What a trace counts, and which traces see it."""

from __future__ import annotations

import threading

from distpatch import Trace, trace
from distpatch.profiling.trace import Recorder


def test_counts() -> None:
    recorder = Recorder()
    with trace() as t:
        recorder.record("p2p", "conv2d", 100, 2)
        recorder.record("p2p", "conv2d", 50, 1)
        recorder.record("all_gather", "group_norm", 8, 1)
        recorder.fallback("sort", "(1, 2)", "model.py:3", 16)
        recorder.fallback("sort", "(1, 2)", "model.py:3", 16)
        recorder.fallback("sort", "(1, 2)", "model.py:4", 16)
    recorder.record("p2p", "after the trace", 1, 1)
    assert (t.sent_bytes, t.messages, t.count("p2p"), t.count("all_gather"), t.count("all_reduce")) == (158, 4, 2, 1, 0)
    assert [(f.op, f.where, f.count, f.bytes) for f in t.fallbacks] == [
        ("sort", "model.py:3", 2, 32),
        ("sort", "model.py:4", 1, 16),
    ]
    assert t.records[0] == type(t.records[0])(kind="p2p", op="conv2d", sent_bytes=100, messages=2)


def test_table() -> None:
    recorder = Recorder()
    with trace() as t:
        recorder.record("p2p", "conv2d", 1_000_000, 2)
        recorder.record("p2p", "conv2d", 500_000, 1)
        recorder.fallback("sort", "(1, 2)", "model.py:3", 16)
    head, conv, sort = t.table().splitlines()
    assert head.split() == ["kind", "op", "calls", "bytes", "sent", "messages", "wait", "ms"]
    assert conv.split() == ["p2p", "conv2d", "2", "1,500,000", "3", "0.0"]
    assert sort.split() == ["fallback", "sort", "1", "16", "(1,", "2)", "at", "model.py:3"]


def test_nested_and_apart() -> None:
    """An inner trace does not take from the outer one; two equal traces are two."""
    recorder = Recorder()
    with trace() as outer:
        recorder.record("p2p", "a", 1, 1)
        with trace() as inner:
            recorder.record("p2p", "b", 1, 1)
        recorder.record("p2p", "c", 1, 1)
    assert ([r.op for r in outer.records], [r.op for r in inner.records]) == (["a", "b", "c"], ["b"])


def test_threads_are_ranks() -> None:
    """Another rank in this process has traces of its own."""
    with trace() as mine:
        other: list[Trace] = []

        def rank() -> None:
            with trace() as t:
                Recorder().record("p2p", "theirs", 1, 1)
            other.append(t)

        thread = threading.Thread(target=rank)
        thread.start()
        thread.join()
        Recorder().record("p2p", "mine", 1, 1)
    assert [r.op for r in mine.records] == ["mine"]
    assert [r.op for r in other[0].records] == ["theirs"]


def test_backward_threads_count_for_the_forward() -> None:
    """autograd may run in a thread that opened no trace: the rank's last trace is meant."""
    recorder = Recorder()
    with trace() as t:
        recorder.record("p2p", "forward", 1, 1)
        thread = threading.Thread(target=lambda: recorder.record("p2p", "backward", 1, 1))
        thread.start()
        thread.join()
    assert [r.op for r in t.records] == ["forward", "backward"]
