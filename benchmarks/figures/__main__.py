"""All figures of the documents, measured again in one run, each with its command, commit, machine and versions.

    python -m benchmarks.figures                    # make figures: about an hour, on a machine that does nothing else
    python -m benchmarks.figures --only breadth     # one section
    python -m benchmarks.figures --list

A command that fails leaves its figures as they are, is named, and makes this end with 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import typer

from benchmarks._harness.crew import ROOT
from benchmarks._harness.printed import machine, said
from benchmarks.figures.sections import SECTIONS, Section, pages, put, words

LOGS = ROOT / "out" / "figures"
LIMIT_SECONDS = 3600.0
WIDEST = 1200  # pixels of a picture in a page
WRITING = Lock()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Failed(Exception):
    """A command of a section, with where its output lies."""


def run(section: Section) -> tuple[str, float]:
    """What the section shows, and seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400" if not section.fenced else "120"}
    threads = {} if section.timed else {"OMP_NUM_THREADS": "1"}
    printed, started = [], time.perf_counter()
    with (LOGS / f"{section.name}.log").open("w") as log:
        for command in section.commands:
            print(f"$ {command}", file=log, flush=True)
            done = subprocess.run(
                words(command),
                cwd=ROOT,
                env={**environment, **threads},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                timeout=LIMIT_SECONDS,
                check=False,
            )
            print(done.stdout, file=log, flush=True)
            if done.returncode:
                raise Failed(f"{command} ended with {done.returncode}: see {log.name}")
            printed.append(done.stdout)
    return "\n".join(printed[-section.shown :]), time.perf_counter() - started


def body(section: Section, printed: str, seconds: float, about: dict[str, Any], commit: str) -> str:
    """The lines of a page: how it was measured, then what was printed."""
    lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
    if lines and lines[0].startswith(about["cpu"]):
        measured, lines = lines[0], lines[1:]
    else:
        measured = said(about)
    commands = "; ".join(f"`{command}`" for command in section.commands[-section.shown :])
    day = datetime.now(UTC).date().isoformat()
    head = f"{commands}, {seconds / 60:.1f} minutes at commit {commit} on {day}. {measured}:"
    text = "\n".join(lines).strip("\n")
    return f"{head}\n\n" + (f"```text\n{text}\n```" if section.fenced else text)


def commit_of(root: Path) -> str:
    """Its short name, and whether files other than documents were changed since."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", ":!*.md")
    return f"{git('rev-parse', '--short', 'HEAD')}{' (changed)' if changed else ''}"


def measure(section: Section, about: dict[str, Any], commit: str, page: Path) -> str:
    """Measured and written into its page; in words what failed."""
    print(f"{section.name} ...", file=sys.stderr, flush=True)
    try:
        printed, seconds = run(section)
    except (Failed, subprocess.TimeoutExpired) as error:
        return f"{section.name}: {error}"
    with WRITING:
        text = page.read_text(encoding="utf-8")
        page.write_text(put(text, section.name, body(section, printed, seconds, about, commit)), encoding="utf-8")
    for source, name in section.pictures:
        _small_copy(ROOT / source, ROOT / "docs" / name)
    print(f"{section.name}: {seconds / 60:.1f} minutes", file=sys.stderr, flush=True)
    return ""


def _small_copy(source: Path, target: Path) -> None:
    """Of a size that a page shows."""
    from PIL import Image

    with Image.open(source) as picture:
        picture.thumbnail((WIDEST, WIDEST))
        picture.save(target, optimize=True)


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="Sections; several times for several.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Say what there is, and measure nothing.")] = False,
) -> None:
    """Measure all figures of the documents again, and write them into their pages."""
    where = pages(ROOT)
    if unknown := set(only or ()) - {section.name for section in SECTIONS}:
        raise typer.BadParameter(f"--only: there is no section {', '.join(sorted(unknown))}")
    chosen = [section for section in SECTIONS if not only or section.name in only]
    if show:
        for section in chosen:
            print(f"{section.name:18}{where[section.name].name:18}{'; '.join(section.commands)}")
        return
    LOGS.mkdir(parents=True, exist_ok=True)
    about, commit, started = machine(), commit_of(ROOT), time.perf_counter()
    problems = [measure(one, about, commit, where[one.name]) for one in chosen if one.timed]
    with ThreadPoolExecutor(about["cores"]) as pool:  # a core each
        untimed = [one for one in chosen if not one.timed]
        problems += pool.map(lambda one: measure(one, about, commit, where[one.name]), untimed)
    problems = [problem for problem in problems if problem]
    print(f"{len(chosen)} sections, {len(problems)} failed, {(time.perf_counter() - started) / 60:.0f} minutes")
    for problem in problems:
        print(problem)
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    app()
