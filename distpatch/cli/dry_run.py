"""``--dry-run``: what would be done with each input, and the memory that it takes, from headers and a config alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import nn

import distpatch
from distpatch.cli.batch import Item
from distpatch.cli.models import one_line
from distpatch.cli.session import Session
from distpatch.planning.report import GIB

if TYPE_CHECKING:
    from distpatch.cli.work import Work

MOST_SHAPES = 16  # that are planned, a few seconds each: the largest


def dry_run(here: Session, items: list[Item], work: Work, rows: int | None) -> None:
    """Print it, on rank 0. Raises ``typer.BadParameter`` for a model that cannot be built."""
    ranks = rows or here.group.size()
    model = None if work.build is None else work.build()
    files: list[dict[str, Any]] = []
    for item in items:
        found: dict[str, Any] = {"source": str(item.source), "output": str(item.output), "exists": item.exists}
        try:
            found["shape"] = work.shape(model, item.source)
        except typer.BadParameter as error:
            found["problem"] = error.message
        files.append(found)
    largest = sorted({found["shape"] for found in files if "shape" in found}, key=math.prod)[-MOST_SHAPES:]
    with here.notes.status(f"planning {len(largest)} shape(s)"):
        memory = {} if model is None else {shape: _memory(here, model, work, shape, ranks) for shape in largest}
    for found in files:
        found["memory_bytes"] = memory.get(found.get("shape", ()))
    report = {"command": work.command, "dry_run": True, "ranks": here.group.size(), "rows": ranks, "files": files}
    here.report(report, "\n".join(["Nothing is done (--dry-run):", *(_line(found, ranks) for found in files)]))


def _memory(here: Session, model: nn.Module, work: Work, shape: tuple[int, ...], ranks: int) -> int | None:
    """Bytes of the rank that needs most; None where the model cannot be planned with this shape."""
    kind = "cpu" if here.device.type == "cpu" else "H100"  # whose rules it follows
    given = torch.empty(shape, dtype=work.dtype, device="meta")
    try:
        planned = distpatch.plan(model, given, method=work.method, world_size=ranks, device=kind)
    except (distpatch.DistPatchError, RuntimeError, ValueError) as error:
        here.notes.print(f"{shape}: cannot be planned: {one_line(error)}")
        return None
    return planned.memory_bytes


def _line(found: dict[str, Any], ranks: int) -> str:
    there = " (exists)" if found["exists"] else ""
    if "problem" in found:
        return str(found["problem"])
    gib = "" if found["memory_bytes"] is None else f", {found['memory_bytes'] / GIB:.3f} GiB a rank of {ranks}"
    return f"{found['source']}: {' x '.join(map(str, found['shape']))}{gib} -> {found['output']}{there}"
