"""The ``distpatch`` command, in this process and under torchrun: results, errors, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import distpatch
from distpatch.cli import app

ROOT = Path(__file__).parents[2]
COMMANDS = ("plan", "decode", "encode", "bench", "doctor")


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def torchrun(*arguments: Any, processes: int = 2, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder, as ``save_pretrained`` writes it, in a pipeline's place, and latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )
    vae.save_pretrained(path / "vae")
    np.save(path / "latents.npy", torch.randn(1, 4, 9, 6).numpy())
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str) -> None:
    done = invoke(command, "--help")
    assert done.exit_code == 0
    assert "Examples:" in done.stdout and f"distpatch {command}" in done.stdout


def test_version() -> None:
    assert invoke("--version").stdout.strip() == distpatch.__version__


def test_decode_and_encode(folder: Path, tmp_path: Path) -> None:
    """A picture, and the same numbers as the model gives; then back to latents."""
    done = invoke("decode", folder, folder / "latents.npy", tmp_path / "a.npy", "--json", "--check")
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    assert numbers["shape"] == [1, 3, 18, 12] and numbers["error"] < 1e-5 and numbers["fallbacks"] == 0
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(np.load(folder / "latents.npy"))).sample
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected.numpy(), atol=1e-5)

    done = invoke("decode", folder, folder / "latents.npy", tmp_path / "a.png")
    assert done.exit_code == 0 and "Decoded 1 x 3 x 18 x 12" in done.stdout
    for suffix in ("npy", "pt", "safetensors"):
        done = invoke("encode", folder / "vae", tmp_path / "a.png", tmp_path / f"b.{suffix}")
        assert done.exit_code == 0 and "Encoded to 1 x 4 x 9 x 6" in done.stdout, done.output
        back = invoke("decode", folder, tmp_path / f"b.{suffix}", tmp_path / f"{suffix}.npy")
        assert back.exit_code == 0, back.output
    np.testing.assert_array_equal(np.load(tmp_path / "pt.npy"), np.load(tmp_path / "safetensors.npy"))


def test_scaled_latents(folder: Path, tmp_path: Path) -> None:
    """A pipeline's latents are divided by the config's factor."""
    latents = np.load(folder / "latents.npy")
    np.save(tmp_path / "scaled.npy", latents * 0.18215)
    assert invoke("decode", folder, tmp_path / "scaled.npy", tmp_path / "a.npy", "--scaled").exit_code == 0
    assert invoke("decode", folder, folder / "latents.npy", tmp_path / "b.npy").exit_code == 0
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), atol=1e-5)


def test_bench(folder: Path) -> None:
    done = invoke("bench", folder, "--shape", "1,4,6,6", "--rounds", 2, "--alone", "--json")
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    assert len(numbers["each_rank"][0]["seconds"]) == 2 and numbers["error"] < 1e-5
    assert numbers["each_rank"][0]["live_bytes"] > 0 and numbers["alone"]["live_bytes"] > 0
    assert "rank 0 alone" in invoke("bench", folder, "--shape", "1,4,6,6", "--rounds", 1, "--alone").stdout


def test_doctor_of_one_process() -> None:
    done = invoke("doctor", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    assert numbers["ok"] and numbers["versions"]["torch"] == torch.__version__ and "gloo" in numbers["backend"]


class StandIn:
    """For the planner: the numbers of ranks it was asked for."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks

    def table(self) -> str:
        return f"table of {self.ranks}"

    def to_json(self) -> str:
        return json.dumps(self.ranks)

    def smallest(self, memory_bytes: float) -> Any:
        fitting = [ranks for ranks in self.ranks if 64 * 2**30 / ranks <= memory_bytes]
        return SimpleNamespace(world_size=fitting[0]) if fitting else None


def test_plan_passes_its_options_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def plan(model: Any, *args: torch.Tensor, world_size: int, **options: Any) -> StandIn:
        given.update(options, model=type(model).__name__, shape=tuple(args[0].shape), dtype=args[0].dtype)
        assert args[0].is_meta and all(parameter.is_meta for parameter in model.parameters())
        if world_size == 3:
            raise ValueError("no such link")
        return StandIn([world_size])

    def scaling(model: Any, *args: torch.Tensor, world_sizes: list[int], **options: Any) -> StandIn:
        return StandIn(world_sizes)

    monkeypatch.setattr(distpatch, "plan", plan, raising=False)
    monkeypatch.setattr(distpatch, "scaling", scaling, raising=False)
    done = invoke("plan", folder, "--shape", "1,4,32,32", "--world-size", 64, "--dtype", "bfloat16")
    assert done.exit_code == 0 and done.stdout == "table of [64]\n", done.output
    assert (given.pop("dtype"), given.pop("device"), given.pop("link")) == (torch.bfloat16, "H100", None)
    assert given == {"method": "decode", "model": "AutoencoderKL", "shape": (1, 4, 32, 32)}
    assert json.loads(invoke("plan", folder, "--json").stdout) == [8]
    several = ["plan", folder, "--world-size", 2, "--world-size", 4, "--fits"]
    done = invoke(*several, 16)
    assert (done.exit_code, done.stdout) == (0, "table of [2, 4]\n") and "fits in 16 GiB: 4 rank(s)" in done.stderr
    assert invoke(*several, 8).exit_code == 1
    done = invoke("plan", folder, "--world-size", 3)
    assert done.exit_code == 2 and "no such link" in done.stderr


def wrong(folder: Path, tmp_path: Path, case: str) -> list[Any]:
    latents, out = folder / "latents.npy", tmp_path / "a.png"
    np.save(tmp_path / "three.npy", np.zeros((4, 9, 6), dtype=np.float32))
    np.save(tmp_path / "channels.npy", np.zeros((1, 5, 9, 6), dtype=np.float32))
    torch.save({"a": torch.zeros(1, 4, 4, 4), "b": torch.zeros(1, 4, 4, 4)}, tmp_path / "two.pt")
    (tmp_path / "text.npy").write_text("no numbers")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    return {
        "no folder": ["decode", tmp_path / "none", latents, out],
        "no config": ["decode", tmp_path, latents, out],
        "no class": ["decode", tmp_path / "other", latents, out],
        "no file": ["decode", folder, tmp_path / "none.npy", out],
        "no tensor": ["decode", folder, tmp_path / "text.npy", out],
        "other suffix": ["decode", folder, latents, tmp_path / "a.gif"],
        "no output folder": ["decode", folder, latents, tmp_path / "none" / "a.png"],
        "three dims": ["decode", folder, tmp_path / "three.npy", out],
        "five channels": ["decode", folder, tmp_path / "channels.npy", out],
        "two tensors": ["decode", folder, tmp_path / "two.pt", out],
        "no such key": ["decode", folder, tmp_path / "two.pt", out, "--key", "c"],
        "no picture": ["encode", folder, tmp_path / "none.png", tmp_path / "a.npy"],
        "shape": ["bench", folder, "--shape", "1,4"],
        "option": ["decode", "--nothing"],
    }[case]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no folder", "there is no such folder"),
        ("no config", "no config.json in it or in its vae folder"),
        ("no class", "has no class 'NoSuchModel'"),
        ("no file", "none.npy: there is no such file"),
        ("no tensor", "cannot be read"),
        ("other suffix", "the output is one of .png"),
        ("no output folder", "there is no folder"),
        ("three dims", "this one is (4, 9, 6)"),
        ("five channels", "the latents of this AutoencoderKL have 4"),
        ("two tensors", "which of its tensors? --key, one of: a, b"),
        ("no such key", "no tensor c in it; it has: a, b"),
        ("no picture", "there is no such file"),
        ("shape", "a shape is at least 4 numbers"),
        ("option", "--nothing"),
    ],
)
def test_wrong_input_is_said_and_ends_with_2(folder: Path, tmp_path: Path, case: str, says: str) -> None:
    done = invoke(*wrong(folder, tmp_path, case))
    assert done.exit_code == 2, done.output
    assert says in " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.output).split())
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_doctor_names_the_pair_of_a_corrupted_message() -> None:
    done = torchrun("tests/launch/faulty_doctor.py", "corrupt", 1, 0)
    assert done.returncode != 0 and "exitcode: 3" in done.stderr, done.stderr
    assert "FAULT point to point, rank 1 to rank 0: 1 of 1 elements are wrong" in done.stdout
    assert done.stdout.count("FAULT") == 1
    assert "now move by all_gather" in done.stdout


@pytest.mark.slow
def test_doctor_names_a_rank_that_never_answers() -> None:
    """Also where it is rank 0, which prints everything else."""
    done = torchrun("tests/launch/faulty_doctor.py", "stop", 0, 0, "--timeout", 10, "--json", processes=3)
    assert done.returncode != 0 and "exitcode: 3" in done.stderr, done.stderr
    faults = json.loads(done.stdout)["faults"]
    assert [(fault["sender"], fault["receiver"]) for fault in faults] == [(0, 1), (0, 2)]
    assert all(fault["problem"].startswith("no answer within 10 s") for fault in faults)
