"""The kit's tables, in markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.section import BEGUN, FAILED, NO_MEMORY, NOT_RUN, OK, PEER_FAILED

HIDDEN = {"row", "status", "why", "took_s"}
LONG = 300  # characters of a reason


def table(report: dict[str, Any]) -> str:
    return "\n".join(_lines(report))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    yield f"# distpatch on {report['device']}, sizes: {report['size']}"
    yield ""
    yield f"{report['seconds']:.0f} s of at most {report['minutes'] * 60:.0f} s; `{report['command']}`"
    for name, section in report["sections"].items():
        yield ""
        yield f"## {name} ({section['title']}), {section['seconds']:.0f} s"
        yield ""
        yield from _rows(section["rows"])
    for status, heading in (
        (FAILED, "Failed"),
        (PEER_FAILED, "Not distpatch's own, and failed"),
        (NO_MEMORY, "Did not fit"),
        (NOT_RUN, "Not run"),
    ):
        found = list(with_status(report, status))
        if found:
            yield ""
            yield f"## {heading}"
            yield ""
            for name, row in found:
                why = " ".join(str(row.get("why", "")).split())
                yield f"- {name}: {row['row']}: {why[:LONG]}"


def _rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in HIDDEN]
    yield f"| | {' | '.join(key.replace('_', ' ') for key in keys)} |" if keys else "| | |"
    yield "|---" * (len(keys) + 1 if keys else 2) + "|"
    for row in rows:
        cells = [_cell(row.get(key)) for key in keys]
        if row["status"] != OK:
            cells = [row["status"], *cells[1:]]
        yield f"| {row['row']} | {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if value != 0 and not abs(value) >= 0.01:
            return f"{value:.1e}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def with_status(report: dict[str, Any], status: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Section names and rows; a row that began and did not end counts as failed."""
    for name, section in report["sections"].items():
        for row in section["rows"]:
            if row["status"] == status or (status == FAILED and row["status"] == BEGUN):
                yield name, row
