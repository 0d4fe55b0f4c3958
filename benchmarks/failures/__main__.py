"""What the other ranks are told, and how soon, when one of three processes fails; torch's default timeout, 30 minutes.

    python -m benchmarks.failures --json failures.json
    python -m benchmarks.failures --only SIGSTOP
    python -m benchmarks.failures --handshake     # what the ranks' meeting before each call costs

A rank fails in the middle of a call. Seconds are until the last of the other ranks has its error; it must name the rank
that failed, and what that raised. After ``--limit`` seconds a case counts as silent. NCCL is simulated on CPUs: waits
that end when all has landed, or never.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks._harness.printed import machine, said
from benchmarks.failures import handshake as meetings
from benchmarks.failures.cases import AGENT, TRANSPORTS, Case, Outcome, all_cases, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    limit: Annotated[float, typer.Option(min=1, help="Seconds after which a case counts as silent.")] = 30,
    only: Annotated[list[str] | None, typer.Option(help="Failures whose names contain this; repeat it.")] = None,
    texts: Annotated[bool, typer.Option(help="Print what every rank was told.")] = False,
    handshake: Annotated[bool, typer.Option(help="The meeting before each call instead.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
) -> None:
    """Three ranks, of which one fails in every way; or, with --handshake, the cost of the ranks' meetings."""
    about = machine()
    print(said(about) + "\n")
    if handshake:
        found: list[Any] = meetings.measure()
        print(meetings.table(found))
    else:
        chosen = [case for case in all_cases() if not only or any(part in case.failure.name for part in only)]
        outcomes = [_shown(run(case, limit), texts) for case in chosen]
        print(table(outcomes))
        found = [_plain(outcome) for outcome in outcomes]
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": about, "results": found}, indent=1))


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a line a failure and store, a column a transport."""
    lines = [
        f"| a rank | store | {' | '.join(TRANSPORTS)} |",
        f"|---|---|{'---|' * len(TRANSPORTS)}",
    ]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for outcome in outcomes:
        case = outcome.case
        rows.setdefault((case.failure.name, case.store), {})[case.transport] = cell(outcome)
    for (failure, store), cells in rows.items():
        lines.append(f"| {failure} | {store} | {' | '.join(cells.get(t, '') for t in TRANSPORTS)} |")
    return "\n".join(lines)


def cell(outcome: Outcome) -> str:
    if outcome.problem:
        return outcome.problem
    seconds = outcome.slowest
    if seconds is None:
        return "silent"
    return f"{seconds:.1f} s, {'named' if outcome.named else 'not named'}"


def _shown(outcome: Outcome, texts: bool) -> Outcome:
    """Printed as soon as it is known, where texts are asked for."""
    if texts:
        print(f"{_title(outcome.case)}: {cell(outcome)}")
        for told in outcome.told:
            print(f"  rank {told.rank}: {told.kind} {told.text}")
    return outcome


def _title(case: Case) -> str:
    return f"rank {case.victim} {case.failure.name}, {case.transport}{'' if case.store == AGENT else ', ' + case.store}"


def _plain(outcome: Outcome) -> dict[str, Any]:
    case = outcome.case
    about = {"failure": case.failure.name, "transport": case.transport, "store": case.store, "victim": case.victim}
    return {**about, "problem": outcome.problem, "told": [asdict(told) for told in outcome.told]}


if __name__ == "__main__":
    app()
