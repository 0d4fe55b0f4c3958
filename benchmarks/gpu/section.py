"""The rows of one section of the kit: each is tried, and what fails is written down and passed by."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

BEGUN, OK, FAILED, NOT_RUN = "begun", "ok", "failed", "not run"
NO_MEMORY, PEER_FAILED = "out of memory", "peer failed"  # results, of which the kit is no less complete
Row = dict[str, Any]


@dataclass(frozen=True)
class Where:
    """Where the kit runs, and how large: ``size`` is "full", "quick" or, on CPUs, "tiny"."""

    gpus: int = 0
    size: str = "tiny"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.gpus else torch.device("cpu")


@dataclass
class Section:
    """One section under way, in a process of its own. Rows go to ``path``, a line of JSON each, as they end."""

    where: Where
    path: Path
    deadline: float
    rows: list[Row] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.where.device

    def pick(self, **by_size: Any) -> Any:
        """One of ``full``, ``quick`` and ``tiny``; ``quick`` is ``full`` where it is not given."""
        return by_size.get(self.where.size, by_size.get("full"))

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def row(self, name: str, work: Callable[[], Row], *, peer: bool = False, anyway: bool = False) -> Row | None:
        """Values of ``work``, or None where it fails or no time is left (but ``anyway``). ``peer``: not ours."""
        if self.seconds_left <= 0 and not anyway:
            self._write({"row": name, "status": NOT_RUN, "why": "out of time"})
            return None
        self._write({"row": name, "status": BEGUN})
        started = time.monotonic()
        try:
            values = work()
            status = {"status": OK}
        except torch.OutOfMemoryError as error:
            values, status = {}, {"status": NO_MEMORY, "why": str(error).split(". ")[0]}
        except Exception as error:
            values, status = {}, {"status": PEER_FAILED if peer else FAILED, "why": reason(error)}
        self._tidy()
        self._write({"row": name, **status, **values, "took_s": round(time.monotonic() - started, 2)})
        return values if status["status"] == OK else None

    def skip(self, name: str, why: str) -> None:
        self._write({"row": name, "status": NOT_RUN, "why": why})

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _tidy(self) -> None:
        gc.collect()
        if self.device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def written(path: Path) -> list[Row]:
    """The rows of a section that has ended, each as it was last, in their order."""
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        rows[row["row"]] = row
    return list(rows.values())


def reason(error: BaseException) -> str:
    """What it said or, since a bare assert says nothing, the line that failed; and where."""
    frames = traceback.extract_tb(error.__traceback__)
    at = frames[-1] if frames else None
    text = str(error).strip() or (at.line if at else "")
    place = f" ({Path(at.filename).name}:{at.lineno})" if at else ""
    return f"{type(error).__name__}: {text[:600]}{place}"


def exact(error: float, tolerance: float, **values: Any) -> Row:
    """A row of a comparison, which fails beyond the tolerance."""
    if not error <= tolerance:
        raise AssertionError(f"differs by {error:.3g}, more than {tolerance:g} ({values})")
    return {**values, "error": error}
