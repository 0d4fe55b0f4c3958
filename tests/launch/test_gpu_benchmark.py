"""``python -m benchmarks.gpu`` on the CPU, at its smallest sizes: every section runs, and none of its rows fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu.__main__ import SECTIONS
from benchmarks.gpu.cases import NETS, Net, net_error
from benchmarks.gpu.convolution import band_error, folded, verdict
from benchmarks.gpu.report import table, with_status
from benchmarks.gpu.section import FAILED, NO_MEMORY, NOT_RUN, OK, PEER_FAILED, Section, Where, written
from distpatch.lazy import recipe
from tests.support.threads import run_ranks
from tests.support.transports.late import late

ROOT = Path(__file__).parents[2]
NEEDS_A_GPU = {"sanitizers", "graph of a converted decode, no group"}


def kit(*options: str, seconds: float = 280, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@pytest.mark.slow
def test_every_section(tmp_path: Path) -> None:
    numbers = tmp_path / "gpu.json"
    done = kit("--json", str(numbers), "--strict")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(numbers.read_text())
    assert list(report["sections"]) == list(SECTIONS) and report["size"] == "tiny"
    for name, section in report["sections"].items():
        statuses = {row["row"]: row["status"] for row in section["rows"]}
        assert {row for row, status in statuses.items() if status != OK} <= NEEDS_A_GPU, (name, section["rows"])
        assert f"## {name} (" in done.stdout
    rows = {row["row"]: row for section in report["sections"].values() for row in section["rows"]}
    assert all(rows[name]["status"] == NOT_RUN and rows[name]["why"] == "no GPU" for name in NEEDS_A_GPU)
    assert rows["4 G float32: plain"]["peak_mib"] > 0 and rows["4 G float32: target"]["target"] == "for GPUs"
    assert rows["64²: converted, bf16"]["launches"] > 0 and rows["64²: converted, fp32"]["error"] < 1e-5
    assert rows["attention"]["messages"] > 0 and rows["halo of 64 KiB, gloo"]["wait_us"] > 0
    assert rows["rank 1 of 2 fails in a call, gloo"]["named"] == "1 of 1"


def test_no_time() -> None:
    """What does not fit into the time is said, section by section."""
    done = kit("--minutes", "0.02", "--only", "threads")
    assert done.returncode == 0 and "## Not run" in done.stdout, done.stdout + done.stderr
    assert "- threads: " in done.stdout and "out of time" in done.stdout


def test_what_fails_is_passed_by(tmp_path: Path) -> None:
    section = Section(Where(), tmp_path / "rows", time.monotonic() + 60)

    def no_memory() -> dict[str, int]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    def wrong() -> dict[str, int]:
        raise AssertionError("differs by 3")

    assert section.row("good", lambda: {"error": 0.0}) == {"error": 0.0}
    assert (
        section.row("large", no_memory)
        is section.row("wrong", wrong)
        is section.row("theirs", wrong, peer=True)
        is None
    )
    section.skip("elsewhere", "1 GPU")
    section.deadline = time.monotonic()
    assert section.row("late", lambda: {}) is None
    rows = written(tmp_path / "rows")
    assert [row["status"] for row in rows] == [OK, NO_MEMORY, FAILED, PEER_FAILED, NOT_RUN, NOT_RUN]
    assert rows[2]["why"].startswith("AssertionError: differs by 3 (test_gpu_benchmark.py:")
    about = {"device": "a CPU", "size": "tiny", "seconds": 1.0, "minutes": 8, "command": "kit"}
    report = {**about, "sections": {"some": {"title": "of the test", "seconds": 1.0, "rows": rows}}}
    assert [row["row"] for _, row in with_status(report, FAILED)] == ["wrong"]
    assert "- some: wrong: AssertionError" in table(report) and "- some: large: CUDA out of memory" in table(report)


@pytest.mark.parametrize("train", [False, True], ids=["lazy", "gradients"])
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_nets(net: Net, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit's own nets are exact, on ranks whose messages are late."""
    monkeypatch.setattr(recipe, "LEAST_BYTES", 0)
    for world in (2, 3, 4):
        with late(delay_s=0.001):
            body = lambda rank: net_error(net, dist.group.WORLD, torch.device("cpu"), train=train)  # noqa: E731
            assert max(run_ranks(world, body, keep=True)) < 1e-10


def test_patch_convs_way() -> None:
    conv, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 32, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = folded(x, conv.weight, conv.bias, 8)
        torch.testing.assert_close(result, conv(x))
        assert band_error(result, x, conv) < 1e-5
        result[:, :, 16] += 0.1
        assert band_error(result, x, conv) > 1e-2


def test_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU: at least 2.4 times less memory than plain torch or, where that fails, than there is."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("About", (), {"total_memory": 80 << 30}))
    ours, gpu = {'distpatch, splits="auto"': 10.0, "distpatch, splits=8": 12.0}, torch.device("cuda", 0)
    assert verdict(gpu, {**ours, "plain": 25.0}) == {"times_less": 2.5, "target": "met"}
    assert verdict(gpu, {**ours, "plain": 20.0}) == {"times_less": 2.0, "target": "not met"}
    assert verdict(gpu, ours)["target"] == "met, plain torch fails"
