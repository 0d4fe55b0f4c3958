"""A decode that one device has no memory for: distpatch, on that device or on two, finishes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("ranks", [1, 2])
def test_does_not_fit(tmp_path: Path, ranks: int) -> None:
    picture = tmp_path / "picture.pt"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.launch.limited_decode", str(BUDGET_MIB), str(picture)],
        cwd=ROOT,
        env={**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("can't allocate memory") == ranks, done.stdout
    assert done.stdout.count("distpatch: fits") == ranks, done.stdout
    right = decode(build(), draw())
    assert_same(torch.load(picture), right, 1e-4, f"picture of {ranks} ranks")
