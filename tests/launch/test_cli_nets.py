"""``distpatch upscale`` and ``segment``: models of transformers, and programs in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from distpatch.cli import files
from distpatch.cli.nets import prepared
from tests.launch.commands import invoke


class Larger(nn.Module):
    """Two times as large, of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2).sigmoid()


def exported(net: nn.Module, path: Path) -> None:
    sides = {2: torch.export.Dim("rows", min=4, max=4096), 3: torch.export.Dim("columns", min=4, max=4096)}
    torch.export.save(torch.export.export(net, (torch.rand(1, 3, 16, 20),), dynamic_shapes=(sides,)), path)


def scripted(net: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.script(net), path)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (33, 36, 3), np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def pixels(photo: Path) -> Tensor:
    return files.read_picture(photo).float() / 255


@pytest.mark.parametrize(("save", "suffix"), [(exported, ".pt2"), (scripted, ".ts")])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_programs_scale_up(save: Callable[[nn.Module, Path], None], suffix: str, photo: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Larger().eval().requires_grad_(False)
    save(net, tmp_path / f"net{suffix}")
    given = ("upscale", tmp_path / f"net{suffix}", photo)
    done = invoke(*given, tmp_path / "a.npy", "--check", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["error"] < 1e-5
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), net(pixels(photo)).numpy(), atol=1e-5)
    assert invoke(*given, tmp_path / "a.png").exit_code == 0
    assert files.shape_of(tmp_path / "a.png") == (1, 3, 66, 72)
    told = json.loads(invoke(*given, tmp_path / "b.png", "--dry-run", "--json").stdout)["files"]
    assert told[0]["shape"] == [1, 3, 33, 36] and told[0]["memory_bytes"] is None
    done = invoke(*given, tmp_path / "b.png", "--dtype", "bfloat16")
    assert done.exit_code == 2 and "a program computes in the dtype that it was saved with" in done.stderr


def test_swin2sr(photo: Path, tmp_path: Path) -> None:
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    torch.manual_seed(0)
    small = {"image_size": 16, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4, "upscale": 2}
    net = Swin2SRForImageSuperResolution(Swin2SRConfig(**small)).eval()
    net.save_pretrained(tmp_path / "net")
    done = invoke("upscale", tmp_path / "net", photo, tmp_path / "a.npy", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["fallbacks"] == 0
    with torch.inference_mode():
        right = net(F.pad(pixels(photo), (0, 0, 0, 3), "reflect")).reconstruction[:, :, :66]  # whole windows
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), right.numpy(), atol=1e-5)


def test_segformer(photo: Path, tmp_path: Path) -> None:
    """The classes of the logits at the picture's size, normalised as the folder says; numbers, and colours."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    net = SegformerForSemanticSegmentation(SegformerConfig(**sizes, num_labels=30)).eval()
    net.save_pretrained(tmp_path / "net")
    SegformerImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.4, 0.3]).save_pretrained(tmp_path / "net")
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    with torch.inference_mode():
        logits = net((pixels(photo) - mean) / std).logits
    right = F.interpolate(logits, size=(33, 36), mode="bilinear", align_corners=False).argmax(1)[0].numpy()
    assert len(np.unique(right)) > 1
    given = ("segment", tmp_path / "net", photo)
    for name in ("a.npy", "a.png", "a.tif"):
        done = invoke(*given, tmp_path / name)
        assert done.exit_code == 0, done.output
        found = np.load(tmp_path / name) if name == "a.npy" else np.array(Image.open(tmp_path / name))
        np.testing.assert_array_equal(found, right)
    assert invoke(*given, tmp_path / "b.png", "--palette").exit_code == 0
    coloured = np.array(Image.open(tmp_path / "b.png"))
    colours = {int(label): tuple(coloured[right == label][0]) for label in np.unique(right)}
    assert all((coloured[right == label] == colour).all() for label, colour in colours.items())
    assert len(set(colours.values())) == len({label % 20 for label in colours})


def test_volumes(tmp_path: Path) -> None:
    """(D, H, W) of whole numbers; a label map of three dims is no picture."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 3, 3, stride=2, padding=1)).eval()
    scripted(net, tmp_path / "net.pt")
    scan = np.random.default_rng(0).integers(-100, 100, (6, 9, 8), np.int16)
    np.save(tmp_path / "scan.npy", scan)
    done = invoke("segment", tmp_path / "net.pt", tmp_path / "scan.npy", tmp_path / "out", "--suffix", "npy")
    assert done.exit_code == 0, done.output
    logits = net(torch.from_numpy(scan)[None, None].float())
    right = F.interpolate(logits, size=scan.shape, mode="trilinear", align_corners=False).argmax(1)[0]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "scan.npy"), right.numpy())
    done = invoke("segment", tmp_path / "net.pt", tmp_path / "scan.npy", tmp_path / "a.png")
    assert done.exit_code == 1 and "do not fit in a .png: --suffix .npy" in done.stderr


def test_what_a_processor_says() -> None:
    x = torch.tensor([0.0, 51.0, 255.0]).view(1, 3, 1, 1)
    assert prepared(x, {}).flatten().tolist() == pytest.approx([0, 0.2, 1])
    how: dict[str, Any] = {"do_rescale": False, "do_flip_channel_order": True}
    assert prepared(x, how).flatten().tolist() == [255, 51, 0]


def test_nets_that_are_none(photo: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.pt2").write_text("no program")
    (tmp_path / "empty").mkdir()
    for model, says in (
        ("broken.pt2", "cannot be loaded as a program"),
        ("none.pt2", "there is no such file"),
        ("none", "there is no such folder, and programs end in .pt2, .pt or .ts"),
        ("empty", "no AutoModelForImageToImage can be loaded"),
    ):
        done = invoke("upscale", tmp_path / model, photo, tmp_path / "a.png")
        assert done.exit_code == 2 and says in done.stderr, done.output
