"""Every example as a user runs it: through torchrun, in processes of its own."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "torchrun_examples"
pytestmark = pytest.mark.slow


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments; what it keeps in the temporary folder goes to ``folder``."""
    one_thread = {"OMP_NUM_THREADS": "1"}  # as torchrun sets it, which says so where nobody did before
    environment = {**one_thread, **os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "TMPDIR": str(folder)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def torchrun(folder: Path, example: str, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run(folder, *launcher, str(EXAMPLES / example), *arguments, "--out", str(folder))


def test_minimal(tmp_path: Path) -> None:
    """Every rank has the result of one device, in a program of no more lines than its page says."""
    lines = (EXAMPLES / "minimal.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 15
    done = torchrun(tmp_path, "minimal.py")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"rank (\d): largest difference from one device ([\d.]+e[+-]\d+)", done.stdout)
    assert sorted(rank for rank, _ in found) == ["0", "1"], done.stdout
    assert all(float(number) < 1e-5 for _, number in found)


def test_every_example_is_listed() -> None:
    page = (EXAMPLES / "README.md").read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f"({example.name})" in page, f"{example.name} is not in torchrun_examples/README.md"


@pytest.mark.parametrize("example", ["train_fabric.py", "train_accelerate.py"])
def test_frameworks(example: str, tmp_path: Path) -> None:
    """Four processes on a mesh of data × rows learn what one does."""
    errors = []
    for processes in (1, 4):
        done = torchrun(tmp_path, example, processes=processes)
        assert done.returncode == 0, done.stderr
        errors.append(re.findall(r"epoch \d: mean squared error ([\d.]+)", done.stdout))
    assert errors[0] == errors[1] and len(errors[0]) == 5, errors
    assert float(errors[0][-1]) < float(errors[0][0]) / 2


def test_segment_volume(tmp_path: Path) -> None:
    """Ranks give what the net gives, windows do not."""
    done = torchrun(tmp_path, "segment_volume.py")
    assert done.returncode == 0, done.stderr
    exact, windows = (float(number) for number in re.findall(r"by ([\d.]+e[+-]\d+) of the largest", done.stdout))
    assert exact < 1e-5 and windows > 1e-2, done.stdout


def test_train_segmentation(tmp_path: Path) -> None:
    """2 x 2 ranks, and two that go on from their checkpoint, have the losses of one process that was not stopped."""

    def train(processes: int, out: str, *more: str) -> str:
        done = torchrun(tmp_path / out, "train_segmentation.py", *more, processes=processes)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "one").mkdir()
    alone = train(1, "one", "--steps", "4")
    whole = max(float(mib) for mib in re.findall(r"at most ([\d.]+) MiB", alone))
    train(4, "first", "--steps", "2")
    resumed = train(2, "second", "--steps", "4", "--resume", str(tmp_path / "first"), "--beside", str(tmp_path / "one"))
    assert float(re.findall(r"Largest difference from one: ([\d.]+e[+-]\d+)", resumed)[0]) < 1e-6, resumed
    shares = [float(mib) for mib in re.findall(r"at most ([\d.]+) MiB", resumed)]
    assert len(shares) == 2 and max(shares) < 0.6 * whole
    assert (tmp_path / "second" / "losses.png").stat().st_size > 0


def test_decode_vae(tmp_path: Path) -> None:
    """Encodes and decodes the photograph on two ranks; differs from one process by rounding only."""
    done = torchrun(tmp_path, "decode_vae.py", "--size", "128")
    assert done.returncode == 0, done.stderr
    differences = [
        float(number) for number in re.findall(r"([\d.]+e[+-]\d+)\s+in the (?:picture|latents)", done.stdout)
    ]
    assert len(differences) == 2, done.stdout
    assert max(differences) < 1e-4
    assert re.search(r"encode .*rank 0.*rank 1.*decode .*rank 0.*rank 1", done.stdout, re.DOTALL), done.stdout
    psnr, alone = (float(number) for number in re.findall(r"([\d.]+)\s+dB", done.stdout))
    assert psnr == alone > 20
    with Image.open(tmp_path / "decode_vae_2_ranks.png") as sheet:
        assert sheet.width == 3 * 128 and sheet.height > 128


def test_decode_vae_says_what_is_wrong(tmp_path: Path) -> None:
    """A photograph that does not exist ends all ranks with the reason, once."""
    done = torchrun(tmp_path, "decode_vae.py", "--image", str(tmp_path / "none.png"))
    assert done.returncode != 0
    assert done.stderr.count("none.png: [Errno 2] No such file or directory") == 1, done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]


def test_train_demo_vae(tmp_path: Path) -> None:
    """Two steps leave an autoencoder that diffusers loads, as the other example does."""
    vae = tmp_path / "vae"
    trained = run(tmp_path, str(EXAMPLES / "train_demo_vae.py"), "--steps", "2", "--out", str(vae))
    assert trained.returncode == 0, trained.stderr
    loaded = AutoencoderKL.from_pretrained(vae).requires_grad_(False)
    assert loaded.decode(loaded.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean).sample.isfinite().all()


def test_every_example_is_tried() -> None:
    tried = Path(__file__).read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f'"{example.name}"' in tried, f"{example.name} has no test"


def difference(output: str) -> float:
    found = re.search(r"Largest difference from one process: ([\d.]+e[+-]\d+)", output)
    assert found, output
    return float(found[1])


def test_decode_video_vae(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "decode_video_vae.py", "--height", "40", "--width", "32", "--frames", "5", "--check")
    assert done.returncode == 0, done.stderr
    assert difference(done.stdout) < 1e-4
    assert (tmp_path / "decode_video_vae_2_ranks.mp4").stat().st_size > 0


def test_pipeline(tmp_path: Path) -> None:
    """Two pictures beside each other, from weights that ship; nothing is said but what the example says."""
    done = torchrun(tmp_path, "pipeline.py", "--prompt", "grass, brick", "--size", "40", "--steps", "2", "--check")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert difference(done.stdout) < 1e-4
    rows = re.findall(r"│ +(\d) │ .*│ +(\d+) │$", done.stdout, re.MULTILINE)
    assert rows == [("0", "0"), ("1", "0")], done.stdout  # nothing is gathered
    with Image.open(tmp_path / "pipeline_2_ranks.png") as picture:
        assert picture.size == (80, 40)


def test_pipeline_says_what_it_can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # examples import each other, as programs do
    prompt_of = importlib.import_module("pipeline").prompt_of
    with pytest.raises(SystemExit, match="there are brick, grass, gravel, tissue, and no a lighthouse"):
        prompt_of(None, "a lighthouse")


def test_train_demo_unet(tmp_path: Path) -> None:
    """Two steps, and one more, leave a U-Net in half precision that is as large as the one that ships."""
    for more in ((), ("--resume",)):
        options = ("--steps", "2", "--crops", "1", "--out", str(tmp_path), *more)
        done = run(tmp_path, str(EXAMPLES / "train_demo_unet.py"), *options)
        assert done.returncode == 0, done.stderr
    weights = "diffusion_pytorch_model.safetensors"
    shipped = (EXAMPLES / "demo_unet" / weights).stat().st_size
    assert (tmp_path / weights).stat().st_size == shipped < 1.5e6


@pytest.mark.parametrize("more", [(), ("--split-guidance",)], ids=str)
def test_displaced_pipeline(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Near the picture of one process; the same one where no step is displaced, which is one rank a half."""
    done = torchrun(
        tmp_path, "displaced_pipeline.py", "--size", "64", "--steps", "8", "--warmup", "4", "--check", *more
    )
    assert done.returncode == 0, done.stderr
    psnr = float(re.findall(r"process: ([\d.]+)\s+dB", done.stdout)[0])
    assert psnr > (100 if more else 30), done.stdout
    behind = float(re.findall(r"│ +0 │(?:[^│]*│){3} +([\d.]+) │", done.stdout)[0])
    assert (behind > 0) == (not more), done.stdout
