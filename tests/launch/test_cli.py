"""The ``distpatch`` command, in this process and under torchrun: results, errors, exit codes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import distpatch
from distpatch.cli import app
from distpatch.cli.autoencoder import check_input
from tests.launch.commands import invoke, torchrun

COMMANDS = ("plan", "decode", "encode", "upscale", "segment", "bench", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str) -> None:
    done = invoke(command, "--help")
    assert done.exit_code == 0
    assert "Examples:" in done.stdout and f"distpatch {command}" in done.stdout


def test_version() -> None:
    assert invoke("--version").stdout.strip() == distpatch.__version__


def test_completion_of_a_shell() -> None:
    env = {"_DISTPATCH_COMPLETE": "complete_bash", "COMP_CWORD": "1", "COMP_WORDS": "distpatch "}
    done = CliRunner().invoke(app, prog_name="distpatch", env=env)
    assert set(COMMANDS) <= set(done.stdout.split()), done.output
    env |= {"COMP_CWORD": "2", "COMP_WORDS": "distpatch encode --res"}
    assert CliRunner().invoke(app, prog_name="distpatch", env=env).stdout.split() == ["--resume"]
    assert "--install-completion" in invoke("--help").stdout


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers gives it
def test_a_model_of_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its id, out of the cache, without a network; what is not there is said in one line."""
    from huggingface_hub import constants

    cached = tmp_path / "models--somebody--pipeline"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder / "vae", cached / "snapshots" / ("0" * 40) / "vae")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for model, name in ((folder, "a"), ("somebody/pipeline", "b")):
        done = invoke("decode", model, folder / "latents.npy", tmp_path / f"{name}.npy")
        assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(np.load("a.npy"), np.load("b.npy"))
    done = invoke("decode", "somebody/else", folder / "latents.npy", tmp_path / "c.npy")
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: Invalid value: somebody/else: there is no such folder, and no model of this name in the hub's"
    )
    assert line.endswith("give the folder that save_pretrained wrote")


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


def test_plan_is_the_planners(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    given = ("plan", folder, "--shape", "1,4,32,32", "--dtype", "bfloat16")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")).eval().bfloat16()
        latents = torch.empty(1, 4, 32, 32, dtype=torch.bfloat16)
    right = distpatch.plan(vae, latents, method="decode", world_size=16, device="L4")
    done = invoke(*given, "--world-size", 16, "--device", "L4", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout) == json.loads(right.to_json()), done.output
    assert "AutoencoderKL.decode of (1, 4, 32, 32) on 8 ranks" in invoke(*given).stdout
    several = distpatch.scaling(vae, latents, method="decode", world_sizes=[2, 4])
    done = invoke(*given, "--world-size", 2, "--world-size", 4, "--plot", tmp_path / "a.png")
    assert done.stdout.strip() == several.table() and (tmp_path / "a.png").stat().st_size > 0


def test_plan_of_a_mesh(folder: Path) -> None:
    given = ("plan", folder, "--shape", "1,4,32,32", "--json")
    for options in (("--mesh", "4x4"), ("--mesh", "auto", "--world-size", 16)):
        plan = json.loads(invoke(*given, *options).stdout)
        assert (plan["mesh"], plan["dims"], plan["world_size"]) == ([4, 4], [-2, -1], 16)
    assert "such as 8x8" in invoke(*given, "--mesh", "8").output


def test_plan_finds_the_fewest_ranks_that_fit(folder: Path) -> None:
    given = ["plan", folder, "--shape", "1,4,64,64"]
    alone, halved = (
        json.loads(invoke(*given, "--world-size", n, "--json").stdout)["memory_bytes"] / (1 << 30) for n in (1, 2)
    )
    assert halved < alone
    done = invoke(*given, "--json", "--fits", (alone + halved) / 2)
    assert done.exit_code == 0 and json.loads(done.stdout)["world_size"] == 2 and "2 rank(s)" in done.stderr
    done = invoke(*given, "--world-size", 1, "--world-size", 4, "--fits", halved)
    assert done.exit_code == 0 and "4 rank(s)" in done.stderr
    done = invoke(*given, "--world-size", 1, "--fits", halved)
    assert done.exit_code == 1 and "none of these rank(s)" in done.stderr
    assert invoke(*given, "--fits", 1e-6).exit_code == 1


def test_plan_without_a_model_and_calibrated() -> None:
    """Stable Diffusion's autoencoder; and this machine's rates, under torchrun its links too."""
    done = torchrun("-m", "distpatch", "plan", "--shape", "1,4,16,16", "--world-size", "2", "--calibrate", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["parameter_bytes"] > 300e6 and plan["seconds"] > 0
    assert plan["link"]["name"] == "2 ranks on cpu, 1 thread, measured" and plan["link"]["bandwidth"] > 0


@pytest.mark.parametrize(
    "options, said",
    [
        (["--device", "Z80"], "device is one of"),
        (["--link", "string"], "link is one of"),
        (["--shape", "1,5,32,32"], "AutoencoderKL.decode takes (B, 4, H, W), and this is (1, 5, 32, 32)"),
        (["--world-size", "100000"], "world_size is a number from 1 to"),
    ],
)
def test_plan_refuses(folder: Path, options: list[str], said: str) -> None:
    done = invoke("plan", folder, "--shape", "1,4,32,32", *options)
    assert done.exit_code == 2 and said in " ".join(done.stderr.replace("│", " ").split()), done.output


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
        ("no class", "has no model 'NoSuchModel'"),
        ("no file", "none.npy: there is no such file"),
        ("no tensor", "cannot be read"),
        ("other suffix", "the output is one of .png"),
        ("no output folder", "there is no folder"),
        ("three dims", "this one is (4, 9, 6)"),
        ("five channels", "AutoencoderKL.decode takes (B, 4, H, W), and this is (1, 5, 9, 6)"),
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


def test_what_an_input_must_look_like() -> None:
    """Clips have frames; a config's in_channels may be those of a patch, and says nothing then."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        config = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
        plain, patched = AutoencoderKLWan(**config), AutoencoderKLWan(**config, in_channels=12, patch_size=2)
    check_input(plain, "decode", (1, 4, 2, 8, 8), "x.npy")
    with pytest.raises(typer.BadParameter, match=r"x.npy: AutoencoderKLWan.decode takes \(B, 4, T, H, W\)"):
        check_input(plain, "decode", (1, 4, 8, 8), "x.npy")
    with pytest.raises(typer.BadParameter, match=r"encode takes \(B, 3, T, H, W\), and this is \(1, 4, 2, 8, 8\)"):
        check_input(plain, "encode", (1, 4, 2, 8, 8), "x.npy")
    check_input(patched, "encode", (1, 3, 2, 8, 8), "x.npy")
