"""README, docs and site: links lead somewhere, commands exist, Python blocks run, the site is built without a warning."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

import distpatch
from benchmarks.figures.sections import SECTIONS, figures_on, names_on, put
from benchmarks.figures.sections import pages as figure_pages
from distpatch.cli import app
from tests.launch.pages import ROOT, pages

PAGES = pages()
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def prose(path: Path) -> str:
    return FENCED.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The names that headings have on a page, as they are made of their words."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Relative links lead to files, and to headings that exist; others are whole addresses."""
    for link in LINK.findall(prose(page)):
        if "://" in link:
            assert re.fullmatch(r"https://[\w.-]+\.\w+/\S*", link), link
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        assert found.exists() and found.is_relative_to(ROOT), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(found), f"{link}: no such heading; there are {sorted(anchors(found))}"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of a block of shell: where it stands, and its words, without those of torchrun."""
    for page in PAGES:
        for language, text in FENCED.findall(page.read_text(encoding="utf-8")):
            for line in text.replace("\\\n", " ").splitlines() if language == "sh" else ():
                words = shlex.split(line, comments=True)
                while words and (re.fullmatch(r"\w+=\S*", words[0]) or words[0] == "do"):
                    del words[0]
                if words:
                    yield f"{page.relative_to(ROOT)}: {line}", words


def without_launcher(words: list[str]) -> list[str]:
    """``torchrun --x -m distpatch decode`` and ``launch/one_host.sh -m distpatch decode`` as ``distpatch decode``."""
    return words[words.index("-m") + 1 :] if "-m" in words else words


def test_commands() -> None:
    """They name sub-commands, options, modules, targets of make and files that exist."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    command: Any = typer.main.get_command(app)
    seen = 0
    for where, words in commands():
        first, *rest = without_launcher(words)
        if first == "distpatch" and rest and rest[0] in command.commands:
            sub = command.commands[rest[0]]
            given = [word for word in rest[1:] if word != ">" and not word.endswith((".json", "$n"))]
            if "..." in given:
                given = [word for word in given if word != "..."]
                sub.make_parser(typer.Context(sub)).parse_args(given)
            else:
                sub.make_context(rest[0], given)
        elif first == "make":
            targets = [word for word in rest if "=" not in word]
            assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in targets), where
        elif first.startswith("benchmarks"):
            assert find_spec(first) is not None, where
        else:
            files = [word for word in words if re.match(r"(tests|launch|torchrun_examples|docs)/\S+", word)]
            assert all((ROOT / file).exists() for file in files), where
        seen += 1
    assert seen > 40


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: distpatch\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(distpatch.__all__)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


def test_figures_are_those_of_their_commands() -> None:
    """Every section has one place, filled by its own command; outside of these no page names a machine."""
    where = figure_pages(ROOT)
    assert sorted(where) == sorted(section.name for section in SECTIONS)
    for section in SECTIONS:
        text = figures_on(where[section.name].read_text(encoding="utf-8"), section.name)
        first, _, rest = text.strip().partition("\n")
        assert all(f"`{command}`" in first for command in section.commands[-section.shown :]), text
        assert re.search(r"at commit [0-9a-f]{7,} on 20\d\d-\d\d-\d\d\. .*torch 2", first) and len(rest) > 50, text
    for page in PAGES:
        outside = page.read_text(encoding="utf-8")
        for name in names_on(outside):
            outside = put(outside, name, "")
        assert not re.search(r"\bAMD\b|EPYC|\bXeon\b", outside), f"{page}: figures that no command makes"


def test_drawings_are_drawn_by_their_program(tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'docs')!r}); import drawings, pathlib; "
    drawn = f"drawings.FOLDER = pathlib.Path({str(tmp_path)!r}); drawings.main()"
    subprocess.run([sys.executable, "-c", program + drawn], check=True, timeout=60)
    for path in (ROOT / "docs" / "drawings").iterdir():
        assert (tmp_path / path.name).read_text() == path.read_text(), f"{path.name}: run make drawings"


def test_site(tmp_path: Path) -> None:
    """Every page is in the navigation and every link leads to a page and a heading of the site, or there is a warning."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(NO_MKDOCS_2_WARNING="1"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr
    for page in ("index.html", "api/index.html", "command/index.html", "repository/launch/index.html"):
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"https?://", text), (
            f"{page} loads from elsewhere"
        )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_python_blocks(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests" / "launch" / "documents.py")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, (
        "\n".join(re.findall(r"FAILED.*?(?=^FAILED|\Z)", done.stdout, re.DOTALL | re.M)) or done.stderr
    )
    blocks = re.findall(r"^(\d+) blocks$", done.stdout, re.MULTILINE)
    assert blocks and int(blocks[0]) >= 39
