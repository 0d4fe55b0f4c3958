"""A decode or a training step that one device has no memory for: distpatch, on that device or on two, finishes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.launch import limited_training
from tests.launch.limited_decode import build, decode, draw
from tests.support.oracle import assert_same

ROOT = Path(__file__).parents[2]
# The plain decode needs about 230 MiB beyond what stands when all is built, distpatch with lazy rows about 130, and
# each of two ranks less than 110.
BUDGET_MIB = 170
# malloc gives freed memory back at once, and reserves no address space for each thread.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, and reads it in /proc"),
]


def run(program: str, budget_mib: int, result: Path, ranks: int) -> dict[str, Tensor] | Tensor:
    """What it leaves, where it did not fit plainly and did with distpatch, on each rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", f"tests.launch.{program}", str(budget_mib), str(result)],
        cwd=ROOT,
        env={**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("can't allocate memory") == ranks, done.stdout
    assert done.stdout.count("distpatch: fits") == ranks, done.stdout
    loaded: dict[str, Tensor] | Tensor = torch.load(result)
    return loaded


@pytest.mark.parametrize("ranks", [1, 2])
def test_decode(tmp_path: Path, ranks: int) -> None:
    right = decode(build(), draw())
    assert_same(run("limited_decode", BUDGET_MIB, tmp_path / "picture.pt", ranks), right, 1e-4, f"of {ranks} ranks")


def test_training_step(tmp_path: Path) -> None:
    """Of a volume: the plain step needs about 230 MiB, each of two ranks less than 150. The weights after it."""
    weights = run("limited_training", 180, tmp_path / "weights.pt", ranks=2)
    net = limited_training.build()
    limited_training.step(net, limited_training.draw())
    for name, right in net.state_dict().items():
        assert_same(weights[name], right, 1e-5, name)
