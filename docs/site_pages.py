"""Hooks of mkdocs: pages that stand elsewhere in the repository, their links, and the command's reference.

A page keeps the links that it has in the repository; here each is turned to where its target is in the site. Files that
are no pages (programs, launchers) come along as they are.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FOLDERS = ("launch", "torchrun_examples", "benchmarks", "tests", "distpatch/rules", "distpatch/lazy")
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", *(f"{folder}/README.md" for folder in FOLDERS))
WITH_SOURCES = ("launch/README.md", "torchrun_examples/README.md")
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml"}

FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")

PARAMETER = re.compile(r"\s(?=<code>\w+</code>:\s)")  # "``group``: a group. ``dim``: ..."


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside ``docs/``, what any page links to there, and the command's page."""
    docs = [f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md")]
    linked = {target for page in (*docs, *PAGES) for target in _targets(page)}
    for path in sorted({*PAGES, *linked}):
        if not path.startswith("docs/") and (ROOT / path).is_file():
            files.append(File.generated(config, _in_site(path), abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "command.md", content=_command()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links, and show the sources of a folder below its page."""
    here = page.file.src_uri
    if here == "command.md":
        return markdown
    path = next((page for page in PAGES if _in_site(page) == here), f"docs/{here}")

    def turned(link: re.Match[str]) -> str:
        target = _in_site(_resolved(path, link[1]))
        if files.get_file_from_path(target) is None:
            return link[0]  # mkdocs warns of it
        return posixpath.relpath(target, posixpath.dirname(here) or ".") + (link[2] or "")

    text = _outside_code(markdown, lambda part: LINK.sub(turned, part))
    return text + _sources(path) if path in WITH_SOURCES else text


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """In the reference, what a docstring says of one parameter after the other stands in a list."""
    if page.file.src_uri != "api.md":
        return html

    def listed(paragraph: re.Match[str]) -> str:
        first, *others = PARAMETER.split(paragraph[1])
        if first.startswith("<code>") and PARAMETER.match(f" {first}"):
            first, others = "", [first, *others]
        items = "".join(f"<li>{item}</li>" for item in others)
        return (f"<p>{first}</p>" if first else "") + (f"<ul>{items}</ul>" if items else "")

    return re.sub(r"<p>(.*?)</p>", listed, html, flags=re.DOTALL)


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    parts = FENCED.split(markdown)
    return "".join(part if place % 2 else change(part) for place, part in enumerate(parts))


def _targets(path: str) -> Iterator[str]:
    """The files of the repository that a page links to."""
    text = FENCED.sub("", (ROOT / path).read_text(encoding="utf-8"))
    yield from (_resolved(path, link[1]) for link in LINK.finditer(text))


def _resolved(path: str, link: str) -> str:
    """Where a link of this page leads in the repository; a folder stands for its page."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return f"{target}/README.md" if (ROOT / target).is_dir() else target


def _in_site(path: str) -> str:
    """Where a file of the repository is in the site: docs/ at its root, pages of the root beside it, folders in one."""
    inside = path.startswith("docs/") or "/" not in path
    return path.removeprefix("docs/") if inside else f"repository/{path}"


def _sources(path: str) -> str:
    """Every file that the page links to in its own folder, folded."""
    folder = posixpath.dirname(path)
    parts = ["\n\n## Sources\n"]
    for target in dict.fromkeys(_targets(path)):
        language = LANGUAGES.get(posixpath.splitext(target)[1])
        if language and posixpath.dirname(target) == folder:
            code = (ROOT / target).read_text(encoding="utf-8")
            lines = [f"```{language}", *code.splitlines(), "```"]
            shown = "\n".join(f"    {line}" if line else "" for line in lines)
            parts.append(f'??? example "{posixpath.basename(target)}"\n\n{shown}\n')
    return "\n".join(parts)


def _command() -> str:
    """The command's help as a page."""
    import typer
    from typer.cli import get_docs_for_click

    from distpatch.cli import app

    command: Any = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="distpatch")
    for name, part in command.commands.items():  # of whose help it takes a few words
        text = re.sub(rf"^\* `{name}`: .*$", f"* `{name}`: {part.help.partition(chr(10))[0]}", text, flags=re.MULTILINE)
    return text
