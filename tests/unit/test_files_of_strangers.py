"""What SECURITY.md says of files: none is unpickled, wherever it is read."""

from __future__ import annotations

import ast
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from distpatch import read_shard
from distpatch.cli import files
from distpatch.cli.models import locate

ROOT = Path(__file__).parents[2]
PROGRAMS = ("torch.export.load(", "torch.jit.load(")  # are code, as SECURITY.md says


class Deed:
    """Leaves a folder behind where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def hostile(tmp_path: Path) -> dict[str, Path]:
    """One file of each kind that would do it."""
    deed, paths = Deed(tmp_path / "done"), {kind: tmp_path / f"a.{kind}" for kind in ("npy", "pt", "zarr")}
    np.save(paths["npy"], np.array([[deed]], dtype=object), allow_pickle=True)
    torch.save({"latents": deed}, paths["pt"])
    paths["zarr"].mkdir()
    codec = {"filters": [{"id": "pickle", "protocol": 5}], "compressor": None, "dtype": "<f4", "fill_value": 0}
    about = {"zarr_format": 2, "shape": [2, 2], "chunks": [2, 2], "order": "C", **codec}
    (paths["zarr"] / ".zarray").write_text(json.dumps(about))
    (paths["zarr"] / "0.0").write_bytes(pickle.dumps(deed))
    return paths


@pytest.mark.parametrize("kind", ["npy", "pt"])
def test_the_command(kind: str, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="cannot be read"):
        files.read_tensor(hostile(tmp_path)[kind])
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_arrays(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("zarr", minversion="3")
    with pytest.raises(Exception, match=r"[Pp]ickle|object"):
        read_shard(hostile(tmp_path)[kind], None, dim=0)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("name", ["DiffusionPipeline", "loaders", "NoSuchModel"])
def test_models_are_models_of_diffusers(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(typer.BadParameter, match=f"has no model '{name}'"):
        locate(tmp_path)


def test_the_source() -> None:
    """Every ``load`` of torch and NumPy says that it does not unpickle; pickle is used between own processes alone."""
    for path in (ROOT / "distpatch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Import | ast.ImportFrom) else ""
            if path.parent.name == "local" or (path.name == "nets.py" and text.startswith(PROGRAMS)):
                continue
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                assert "weights_only=True" in text or "allow_pickle=False" in text, (path, text)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in text, (path, text)
