"""Training with FSDP2 and DDP: before or after the conversion, on the same ranks or others, as one process trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.procs import sharding
from tests.procs.pool import Pool
from tests.support.oracle import assert_same, random_tensor

CASES: dict[str, dict[str, Any]] = {
    "before": {"mesh": "rows", "order": "before"},
    "after": {"mesh": "rows", "order": "after"},
    "before, kept after forward": {"mesh": "rows", "order": "before", "reshard": False},
    "before, over data": {"mesh": "data", "order": "before"},
    "after, over data, kept after forward": {"mesh": "data", "order": "after", "reshard": False},
    "before, over rows of two": {"mesh": "over rows", "order": "before"},
    "before, HSDP": {"mesh": "hsdp", "order": "before"},
    "after, HSDP, clipped": {"mesh": "hsdp", "order": "after", "clip": 0.1},
    "before, recomputed": {"mesh": "rows", "order": "before", "recompute": True},
    "before, over data, recomputed, in two parts, clipped": {
        "mesh": "data", "order": "before", "recompute": True, "parts": 2, "clip": 0.1,
    },
    "before, encode": {"mesh": "rows", "order": "before", "entry": "encode"},
    "after, encode": {"mesh": "rows", "order": "after", "entry": "encode"},
    "DDP around, over data": {"mesh": "data", "order": "", "ddp": "around"},
    "DDP inside, over data": {"mesh": "data", "order": "", "ddp": "inside"},
}  # fmt: skip


def right(options: dict[str, Any]) -> tuple[list[torch.Tensor], torch.Tensor]:
    model = sharding.net()
    parameters = sharding.optimize(model, model, slice(None), 1, options.get("clip"))
    with torch.no_grad():
        return parameters, model(random_tensor((1, 3, sharding.HEIGHT, 6)))


@pytest.mark.parametrize("name", CASES)
def test_trains_as_one_process(pool: Pool, name: str) -> None:
    options = CASES[name]
    wanted, image = right(options)
    outcomes = pool.run(3 if options["mesh"] == "rows" else 4, sharding.trained, options, timeout=60)
    for rank, (parameters, _, restored) in enumerate(outcomes):
        for index, (value, plain) in enumerate(zip(parameters, wanted, strict=True)):
            assert_same(value, plain, 1e-8, f"{name}: parameter {index} on rank {rank}")
        assert_same(restored, image, 1e-8, f"{name}: the restored model's image on rank {rank}")


@pytest.mark.parametrize("order", ["before", "after"])
def test_mixed_precision(pool: Pool, order: str) -> None:
    options = {"mesh": "rows", "order": order, "mixed": True, "dtype": torch.float32}
    wanted, _ = right(options)
    for parameters, _, _ in pool.run(2, sharding.trained, options, timeout=60):
        for value, plain in zip(parameters, wanted, strict=True):
            assert (value.double() - plain).abs().max() < 0.1  # of bfloat16, five steps on


def test_a_dtensor_that_nothing_gathers_is_refused(pool: Pool) -> None:
    for message in pool.run(2, sharding.tensor_parallel):
        assert "a DTensor of shape (4, 3, 3, 3)" in message and "register_fsdp_forward_method" in message
