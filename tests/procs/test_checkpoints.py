"""torch.distributed.checkpoint: sharded tensors and converted models, saved by some ranks and loaded by others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.procs import checkpoints
from tests.procs.pool import Pool


@pytest.mark.parametrize(("saved", "loaded"), [(4, 2), (2, 3), (3, 1)])
def test_tensors(pool: Pool, tmp_path: Path, saved: int, loaded: int) -> None:
    """Each rank writes its rows and no others; another number of ranks, with other rows, reads them."""
    largest = pool.run(saved, checkpoints.save_tensors, str(tmp_path), True, timeout=60)
    whole = {name: x for name, (x, _) in checkpoints.TENSORS.items()}
    assert max(largest) < max(x.nbytes for x in whole.values())
    whole["tokens"] = checkpoints.tokens(whole["latents"])
    written = FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    for name, x in whole.items():
        assert sum(chunk.sizes.numel() for chunk in written[name].chunks) == x.numel(), "each row is written once"
    for result in pool.run(loaded, checkpoints.load_tensors, str(tmp_path), False, timeout=60):
        assert result["step"] == 7
        for name, x in whole.items():
            assert torch.equal(result[name], x), name


def test_training_goes_on_elsewhere(pool: Pool, tmp_path: Path) -> None:
    """4 -> 2 -> 1 ranks, the last one with an unconverted model: as one process that was never interrupted."""
    first, second = str(tmp_path / "four"), str(tmp_path / "two")
    pool.run(4, checkpoints.train, 2, 2, 2, "", first, timeout=60)
    pool.run(2, checkpoints.train, 1, 2, 2, first, second, timeout=60)
    (resumed,) = pool.run(1, checkpoints.train, 1, 1, 1, second, timeout=60)
    (expected,) = pool.run(1, checkpoints.train, 1, 1, 5, timeout=60)
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-9, atol=1e-9, msg=name)
