"""Data x rows: whatever is put around the converted model, five steps are those of one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from tests.procs import training
from tests.procs.pool import Pool
from tests.support.oracle import assert_same

SYNC = {"norm": "batch", "sync": "all"}
CASES: dict[str, dict[str, Any]] = {
    "rows alone": {},
    "rows alone, BatchNorm": {"norm": "batch"},
    "DDP": {"wrap": "ddp"},
    "DDP over all ranks": {"wrap": "ddp", "over": "all"},
    "DDP, accumulated": {"wrap": "ddp", "parts": 2},
    "DDP, clipped, scaled": {"wrap": "ddp", "clip": 0.05, "scaler": True},
    "DDP, SGD": {"wrap": "ddp", "optimizer": "SGD"},
    "DDP, averaged": {"wrap": "ddp", "average": True},
    "rows alone, recomputed": {"recompute": "reentrant"},
    "DDP, recomputed": {"wrap": "ddp", "recompute": "not reentrant"},
    "DDP, SyncBatchNorm": {"wrap": "ddp", **SYNC},
    "DDP, SyncBatchNorm over data": {"wrap": "ddp", "norm": "batch", "pooled": "batch", "sync": "data"},
    "DDP, SyncBatchNorm, recomputed": {"wrap": "ddp", **SYNC, "recompute": "not reentrant"},
    "rows alone, convolutions kept": {"recompute": "selective"},
    "FSDP2, convolutions kept": {"wrap": "fsdp", "recompute": "selective"},
    "FSDP2 before": {"wrap": "fsdp"},
    "FSDP2 after": {"wrap": "fsdp", "order": "after"},
    "FSDP2 over rows": {"wrap": "fsdp", "over": "rows", "reshard": False},
    "FSDP2 over all ranks": {"wrap": "fsdp", "over": "all"},
    "FSDP2 over all ranks, after, kept": {"wrap": "fsdp", "over": "all", "order": "after", "reshard": False},
    "HSDP before, clipped, scaled": {"wrap": "fsdp", "over": "both", "clip": 0.05, "scaler": True},
    "HSDP after, SyncBatchNorm": {"wrap": "fsdp", "over": "both", "order": "after", **SYNC},
    "FSDP2, accumulated": {"wrap": "fsdp", "parts": 2},
    "FSDP2, recomputed": {"wrap": "fsdp", "recompute": "reentrant"},
    "FSDP2, recomputed, not reentrant": {"wrap": "fsdp", "recompute": "not reentrant"},
    "FSDP2, SyncBatchNorm over data, recomputed": {
        "wrap": "fsdp",
        **SYNC,
        "pooled": "batch",
        "sync": "data",
        "recompute": "not reentrant",
    },
    "FSDP2, SyncBatchNorm over data": {"wrap": "fsdp", "norm": "batch", "pooled": "batch", "sync": "data"},
}

Trained = dict[str, tuple[dict[str, Tensor], list[float]]]


@pytest.fixture(scope="module")
def trained(pool: Pool) -> list[Trained]:
    return pool.run(4, training.trained, CASES, timeout=60)


@pytest.mark.parametrize("name", CASES)
def test_trains_as_one_process(trained: list[Trained], name: str) -> None:
    wanted, norms = training.one_process(CASES[name])
    for rank, results in enumerate(trained):
        state, found = results[name]
        assert state.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same(state[key], value, 1e-8, f"{name}: {key} on rank {rank}")
        assert found == pytest.approx(norms, rel=1e-8), f"{name}: norms of the gradients on rank {rank}"


def test_sync_batch_norm_of_what_several_ranks_hold_alike_is_refused(pool: Pool) -> None:
    for message in pool.run(2, training.of_a_mean):
        assert "give it the group of data parallelism alone" in message
