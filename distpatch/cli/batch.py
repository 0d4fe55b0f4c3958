"""Many inputs: which file becomes which, which ranks share one, and what is there already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import typer

from distpatch.cli.session import Session, told
from distpatch.comm.communicator import Communicator, communicator

LIST = ".txt"


@dataclass(frozen=True)
class Request:
    """What the options of a command say of its files.

    ``rows``: how many ranks share one input (None: all).
    """

    sources: Sequence[Path]
    output: Path
    suffix: str | None = None
    rows: int | None = None
    resume: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Item:
    """One input. ``exists``: the output is there; since it got its name when it was complete, all of it."""

    source: Path
    output: Path
    exists: bool


@dataclass(frozen=True)
class Team:
    """The ranks that share an input, and which of all teams they are."""

    group: dist.ProcessGroup
    index: int
    count: int

    @property
    def comm(self) -> Communicator:
        return communicator(self.group)


def team_of(here: Session, rows: int | None) -> Team:
    """Every rank calls it, with a number by which all ranks can be divided (``items_of`` checks it)."""
    size = here.group.size()
    if rows is None or rows == size:
        return Team(here.group, 0, 1)
    group, _ = dist.new_subgroups(rows, timeout=here.patience)
    assert group is not None
    return Team(group, here.group.rank() // rows, size // rows)


def items_of(here: Session, request: Request, reads: Sequence[str], writes: Sequence[str]) -> tuple[bool, list[Item]]:
    """Whether it is one file that was named by itself, and all inputs: rank 0 looks, and all ranks get the same.

    Raises ``typer.BadParameter``, on rank 0 for all, where the outputs cannot be what the options say.
    """

    def look() -> Any:
        size = here.group.size()
        if request.rows is not None and size % request.rows and not request.dry_run:
            raise typer.BadParameter(f"--rows {request.rows}: the {size} ranks cannot be divided by it")
        alone, pairs = _pairs(request, reads, writes)
        if not request.dry_run:
            for folder in {output.parent for _, output in pairs}:
                folder.mkdir(parents=True, exist_ok=True)
        return alone, [(str(source), str(output), output.exists()) for source, output in pairs]

    alone, found = told(here, look)
    return alone, [Item(Path(source), Path(output), exists) for source, output, exists in found]


def _pairs(request: Request, reads: Sequence[str], writes: Sequence[str]) -> tuple[bool, list[tuple[Path, Path]]]:
    output, first = request.output, request.sources[0]
    alone = len(request.sources) == 1 and not first.is_dir() and first.suffix != LIST
    suffix = _suffix(request.suffix, writes)
    if alone and not first.is_file():
        raise typer.BadParameter(f"{first}: there is no such file")
    if alone and output.suffix and not output.is_dir():
        _check_output(output, writes)
        return True, [(first, output)]
    if output.suffix.lower() in writes and not output.is_dir():
        raise typer.BadParameter(f"{output}: of several inputs the output is a folder")
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output}: is a file, and the output is a folder")
    pairs: dict[Path, Path] = {}
    for source, name in _named(request, reads):
        target = (output / name).with_suffix(suffix)
        if pairs.setdefault(target, source) != source:
            raise typer.BadParameter(f"{pairs[target]} and {source} would both become {target}: rename one of them")
    if not pairs:
        raise typer.BadParameter(f"{first}: there is no file in it that ends in one of {', '.join(reads)}")
    return alone, [(source, target) for target, source in pairs.items()]


def _named(request: Request, reads: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """Each input, and its name in the output's folder: of a folder's files with their folders in it."""
    output = request.output.resolve()
    for source in request.sources:
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                inside = path.relative_to(source)
                hidden = any(part.startswith(".") for part in inside.parts)
                written = output != source.resolve() and path.resolve().is_relative_to(output)
                if path.suffix.lower() in reads and path.is_file() and not hidden and not written:
                    yield path, inside
        elif source.suffix == LIST:
            try:
                lines = source.read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise typer.BadParameter(f"{source}: cannot be read as a list of paths: {error}") from error
            yield from ((Path(line.strip()), Path(Path(line.strip()).name)) for line in lines if line.strip())
        else:
            yield source, Path(source.name)


def _suffix(wanted: str | None, writes: Sequence[str]) -> str:
    """What an output's name ends in; the first of what can be written if nothing else is wanted."""
    suffix = writes[0] if wanted is None else f".{wanted.lower().removeprefix('.')}"
    if suffix not in writes:
        raise typer.BadParameter(f"--suffix {wanted}: it is one of {', '.join(writes)}")
    return suffix


def _check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Before hours of work: a file of this name can be written."""
    if path.suffix.lower() not in suffixes:
        raise typer.BadParameter(f"{path}: the output is one of {', '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path}: there is no folder {path.absolute().parent}")
