"""What is public: benchmarks and examples need no other names of distpatch, and the package says what it exports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools
import tomllib

import distpatch

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("benchmarks", "torchrun_examples") for path in (ROOT / folder).rglob("*.py"))
PUBLIC = {*distpatch.__all__, "__version__", "launch", "monai.WholeInferer"}


def names_of_distpatch(tree: ast.AST) -> Iterator[str]:
    """Every name below ``distpatch`` that a program imports or reads, a dotted one whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (name.partition(".")[2] for name in names if name.startswith("distpatch."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "distpatch":
            inside = (node.module or "").partition(".")[2]
            yield from (f"{inside}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "distpatch":
            yield node.attr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_benchmarks_and_examples_use_public_names(path: Path) -> None:
    assert set(names_of_distpatch(ast.parse(path.read_text()))) <= PUBLIC


def test_every_public_name_exists_and_is_documented() -> None:
    assert sorted(distpatch.__all__, key=lambda name: (not name.isupper(), name)) == distpatch.__all__
    for name in distpatch.__all__:
        value = getattr(distpatch, name)
        assert name.isupper() or value.__doc__, name


def test_what_is_installed() -> None:
    """One top-level package, whose types are public, and the pages in its folders."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = setuptools.find_packages(str(ROOT), **settings["packages"]["find"])
    assert {name.partition(".")[0] for name in packages} == {"distpatch"}
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "distpatch").rglob("*.py")}
    assert set(packages) == folders
    (package,), patterns = settings["package-data"].keys(), settings["package-data"]["distpatch"]
    assert "py.typed" in patterns and (ROOT / package / "py.typed").exists()
