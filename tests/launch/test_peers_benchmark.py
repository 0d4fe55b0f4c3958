"""``python -m benchmarks.peers``: one peer measured, one that is not installed, one that fails; table, JSON, plot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_peers(tmp_path: Path) -> None:
    """distpatch is exact and counted; DTensor, which refuses the group norm, is shown with its message."""
    numbers, picture = tmp_path / "peers.json", tmp_path / "peers.png"
    options = ["--size", "64", "--rounds", "1", "--workload", "stack", "--device", "cpu"]
    peers = ["--only", "distpatch", "--only", "dtensor"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *options, *peers, "--json", str(numbers), "--plot", str(picture)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "150"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    results = {result["peer"]: result for result in json.loads(numbers.read_text())["results"]}
    assert set(results) == {"one process", "distpatch", "DTensor"}
    ours, alone = results["distpatch"], results["one process"]
    assert ours["error"] < 1e-5 and ours["sent_bytes"] > 0 and ours["calls"] > 0 and ours["ranks"] == 2
    assert 0 < alone["error"] < 1e-5 and alone["live_bytes"] > 0 and alone["versions"]["torch"]
    assert "Error" in results["DTensor"]["problem"] and re.search(r"DTensor: \w+Error", done.stdout)
    assert picture.stat().st_size > 0
    again = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--from", str(numbers)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "150"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert again.stdout.split() == done.stdout.split(), again.stderr  # the progress bar leaves an empty line


def test_wrong_options_are_said() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--only", "nobody"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "there is no peer nobody" in done.stderr
