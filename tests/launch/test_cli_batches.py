"""Many inputs of one ``distpatch`` command: names, shapes, one that is bad, a run that was stopped, teams of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import distpatch
from distpatch.cli import files, work
from tests.launch.commands import invoke, torchrun

JUNK = "no picture"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two pictures, one in a folder of its own; a hidden file, one that is no picture, and one of odd rows."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, shape in {"a.png": (18, 12, 3), "sub/b.webp": (20, 14, 3), "odd.png": (17, 12, 3)}.items():
        Image.fromarray(draw.integers(0, 255, shape, np.uint8)).save(folder / name, lossless=True)
    for name in ("bad.png", ".hidden.png", "notes.md"):
        (folder / name).write_text(JUNK)
    return folder


def numbers_of(done: Any, code: int = 0) -> Any:
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def check_report(numbers: Any, photos: Path, latents: Path) -> None:
    """What is told of ``photos``: two are done, two are named."""
    names = {Path(done["source"]).name: done["shape"] for done in numbers["files"]}
    assert names == {"a.png": [1, 4, 9, 6], "b.webp": [1, 4, 10, 7]} and numbers["there_already"] == 0
    problems = {Path(failed["source"]).name: failed["problem"] for failed in numbers["failed"]}
    assert set(problems) == {"bad.png", "odd.png"}
    assert problems["bad.png"].startswith(f"{photos / 'bad.png'}: cannot be read as a picture")
    assert "17 x 12 pixels are no multiple of 2, of which a latent is made: --fit crop" in problems["odd.png"]
    written = sorted(str(path.relative_to(latents)) for path in latents.rglob("*") if path.is_file())
    assert written == ["a.safetensors", "sub/b.safetensors"]


def test_a_folder_there_and_back(folder: Path, photos: Path, tmp_path: Path) -> None:
    """One bad file is named, the others are done; what is there is left out; a list and several files are the same."""
    given = ("encode", folder, photos, tmp_path / "latents", "--json")
    done = invoke(*given)
    check_report(numbers_of(done, 1), photos, tmp_path / "latents")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 2 and all(line.startswith(f"error: rank 0: {photos}/") for line in lines)
    again = numbers_of(invoke(*given, "--resume", "--fit", "pad"), 1)
    assert again["there_already"] == 2 and [Path(file["source"]).name for file in again["files"]] == ["odd.png"]

    (tmp_path / "list.txt").write_text(f"{photos / 'a.png'}\n\n{photos / 'sub' / 'b.webp'}\n")
    for sources in ([tmp_path / "list.txt"], [photos / "a.png", photos / "sub" / "b.webp"]):
        assert (
            len(numbers_of(invoke("encode", folder, *sources, tmp_path / "npy", "--suffix", "npy", "--json"))["files"])
            == 2
        )
        for name in ("a", "b"):
            right = next((tmp_path / "latents").rglob(f"{name}.safetensors"))
            np.testing.assert_array_equal(np.load(tmp_path / "npy" / f"{name}.npy"), load_file(right)["latents"])
    done = invoke("decode", folder, tmp_path / "latents", tmp_path / "pictures", "--check", "--json")
    assert all(file["error"] < 1e-5 for file in numbers_of(done)["files"])
    assert files.shape_of(tmp_path / "pictures" / "sub" / "b.png") == (1, 3, 20, 14)
    text = invoke("decode", folder, tmp_path / "latents", tmp_path / "pictures", "--resume").stdout
    assert "0 of 3 in" in text and "3 were there already" in text


def test_names_that_clash_and_outputs_that_are_none(folder: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "a.jpg").write_text(JUNK)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for sources, output, options, says in (
        ([photos], "out", (), "would both become"),
        ([photos / "a.png", photos / "a.jpg"], "out.npy", (), "of several inputs the output is a folder"),
        ([photos], "file", (), "is a file, and the output is a folder"),
        ([photos], "out", ("--suffix", "gif"), "it is one of .safetensors"),
        ([tmp_path / "empty"], "out", (), "there is no file in it"),
        ([photos], "out", ("--rows", "2"), "the 1 ranks cannot be divided by it"),
        ([photos], "out", ("--size", "2x3x4"), "--size is such as 512"),
    ):
        done = invoke("encode", folder, *sources, tmp_path / output, *options)
        assert done.exit_code == 2 and says in " ".join(done.output.replace("│", " ").split()), done.output
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_stopped(folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not complete has no name, and is made by the next run."""
    write = files.write_tensor

    def stopped(tensor: torch.Tensor, path: Path, key: str) -> None:
        write(tensor, path, key)
        path.write_bytes(path.read_bytes()[:-8])
        raise KeyboardInterrupt

    given = ("encode", folder, photos / "a.png", photos / "sub", tmp_path / "latents", "--resume", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_tensor", stopped)
        assert invoke(*given).exit_code != 0
    assert [path.name for path in (tmp_path / "latents").iterdir()] == [".a.partial.safetensors"]
    assert len(numbers_of(invoke(*given))["files"]) == 2
    assert sorted(path.name for path in (tmp_path / "latents").iterdir()) == ["a.safetensors", "b.safetensors"]


def test_teams_of_ranks(folder: Path, photos: Path, tmp_path: Path) -> None:
    """Two pairs of ranks: the same latents as one process, and the same report."""
    invoke("encode", folder, photos, tmp_path / "one")
    done = torchrun("-m", "distpatch", "encode", folder, photos, tmp_path / "many", "--rows", 2, "--json", processes=4)
    assert done.returncode == 1, done.stderr
    numbers = json.loads(done.stdout)
    assert (numbers["ranks"], numbers["rows"]) == (4, 2)
    check_report(numbers, photos, tmp_path / "many")
    assert {failed["rank"] for failed in numbers["failed"]} <= {0, 2}
    for path in (tmp_path / "one").rglob("*.safetensors"):
        right, got = load_file(path), load_file(tmp_path / "many" / path.relative_to(tmp_path / "one"))
        torch.testing.assert_close(got["latents"], right["latents"], atol=1e-5, rtol=1e-5)


def test_dry_run(folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and memory as they will be, of any number of ranks; nothing is read or written."""
    monkeypatch.setattr(work, "first", None)  # which loads
    sources = [photos / name for name in ("a.png", "bad.png", "odd.png")]
    given = ("encode", folder, *sources, tmp_path / "out", "--dry-run", "--rows", 2, "--json")
    found = {Path(file["source"]).name: file for file in numbers_of(invoke(*given))["files"]}
    assert not (tmp_path / "out").exists()
    assert "no multiple of 2" in found["odd.png"]["problem"] and "cannot be read" in found["bad.png"]["problem"]
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    plan = distpatch.plan(vae, torch.empty(1, 3, 18, 12), method="encode", world_size=2, device="cpu")
    assert found["a.png"]["memory_bytes"] == plan.memory_bytes
    done = invoke("encode", folder, sources[1], tmp_path / "out", "--dry-run")
    assert done.exit_code == 0 and "bad.png: cannot be read as a picture" in done.stdout.replace("\n", "")


def test_pictures_as_they_are_meant(tmp_path: Path) -> None:
    """Upright, covered and cut to a size; what has more than 8 bits a sample would be clipped, and is refused."""
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    exif = Image.Exif()
    exif[files.ORIENTATION] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = files.read_picture(tmp_path / "turned.png")
    np.testing.assert_array_equal(turned[0].permute(1, 2, 0), np.rot90(pixels, -1))
    assert files.shape_of(tmp_path / "turned.png") == tuple(turned.shape) == (1, 3, 8, 6)
    assert files.read_picture(tmp_path / "turned.png", (4, 6)).shape == (1, 3, 4, 6)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(tmp_path / "deep.png")
    with pytest.raises(Exception, match="8 bits a sample"):
        files.read_picture(tmp_path / "deep.png")
    x = torch.arange(15.0).view(1, 1, 3, 5)
    assert files.cut_or_padded(x, 4, 4)[0, 0].tolist() == [
        [0, 1, 2, 3],
        [5, 6, 7, 8],
        [10, 11, 12, 13],
        [10, 11, 12, 13],
    ]
    assert [files.fitted((3, 17, 8), 8, fit, tmp_path) for fit in ("crop", "pad", "keep")] == [
        (16, 8),
        (24, 8),
        (17, 8),
    ]


def test_clips(tmp_path: Path) -> None:
    """A video's frames are encoded as the same frames in a tensor; a picture is a clip of one frame."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    config = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
    AutoencoderKLWan(**config, scale_factor_spatial=2).save_pretrained(tmp_path / "wan")
    clip = torch.rand(1, 3, 5, 16, 12)
    distpatch.save_video(clip, tmp_path / "clip.mp4", fps=8)
    frames = files.read_clip(tmp_path / "clip.mp4")
    assert files.shape_of(tmp_path / "clip.mp4") == tuple(frames.shape) == (1, 3, 5, 16, 12)
    np.save(tmp_path / "frames.npy", (frames.float() / 127.5 - 1).numpy())
    Image.fromarray(frames[0, :, 0].permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    sources = [tmp_path / name for name in ("clip.mp4", "frames.npy", "one.png")]
    done = numbers_of(invoke("encode", tmp_path / "wan", *sources, tmp_path / "out", "--suffix", ".npy", "--json"))
    assert [file["shape"] for file in done["files"]] == [[1, 4, 3, 8, 6], [1, 4, 3, 8, 6], [1, 4, 1, 8, 6]]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "clip.npy"), np.load(tmp_path / "out" / "frames.npy"))
    assert invoke("decode", tmp_path / "wan", tmp_path / "out", tmp_path / "back", "--suffix", "mkv").exit_code == 0
    assert files.read_clip(tmp_path / "back" / "clip.mkv").shape == frames.shape
