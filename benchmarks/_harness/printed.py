"""How a benchmark prints: Markdown tables, under a line that says on what they were measured."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

WIDE = 400  # columns of what goes to a file: no row of a table is broken


def wide_console(quiet: bool = False) -> Any:
    """Where a benchmark prints: a terminal as it is, a file with lines that hold a table."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE, quiet=quiet)


def markdown_table(title: str, *headings: str, texts: int = 1) -> Any:
    """A table of rich that prints as one of Markdown; the first ``texts`` columns stand left, numbers right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.MARKDOWN)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < texts else "right", no_wrap=True)
    return table


def machine() -> dict[str, Any]:
    """What a measurement has to be read with."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    about = {"cpu": model, "cores": cores, "gpus": gpus, "torch": torch.__version__}
    return {**about, "python": platform.python_version()}


def said(about: dict[str, Any], *more: str) -> str:
    """The machine in words: the line above a table."""
    gpus = [f"{len(about['gpus'])} x {about['gpus'][0]}"] if about["gpus"] else []
    return ", ".join([about["cpu"], f"{about['cores']} cores", *gpus, f"torch {about['torch']}", *more])
