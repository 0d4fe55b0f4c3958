"""What is built to be installed: its files, its one version, and its types as a user's checker sees them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tomllib

import distpatch

ROOT = Path(__file__).parents[2]
USER = Path(__file__).parent / "typed_user.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what a build leaves beside its sources stays out of the repository."""
    folder = tmp_path_factory.mktemp("source")
    copied = ["distpatch", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in copied), str(folder)], check=True)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "dist").iterdir()
    return path


def test_files(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert f"-{distpatch.__version__}-" in wheel.name
    assert {"distpatch/py.typed", "distpatch/rules/README.md"} <= names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "distpatch").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert f"version: {distpatch.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{distpatch.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_types(wheel: Path, tmp_path: Path) -> None:
    """An environment with the wheel in it, and what this one has: the checker finds one error, which is one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=60)
    (installed,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(installed)
    (installed / "rest.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "user.py").write_text(USER.read_text())  # beside nothing of ours
    python, cache = str(tmp_path / "venv" / "bin" / "python"), str(tmp_path / "cache")
    settings = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "MYPYPATH"}}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "--cache-dir", cache, "user.py"],
        cwd=tmp_path,
        env=settings,
        capture_output=True,
        text=True,
        timeout=240,
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1 and 'Unexpected keyword argument "splitz"' in errors[0], done.stdout + done.stderr
