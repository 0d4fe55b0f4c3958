"""A command's work on its inputs, one after the other: read, call, write; one that fails is named, the others go on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import distpatch
from distpatch import launch
from distpatch.cli.batch import Item, Request, Team, items_of, team_of
from distpatch.cli.dry_run import dry_run
from distpatch.cli.models import one_line
from distpatch.cli.session import FAILED, Session, first, told
from distpatch.comm.together import together

Call = Callable[[nn.Module, Tensor], Tensor]
STORE = "distpatch/cli"
MOMENT_S = 0.1


@dataclass(frozen=True)
class Work:
    """What a command does with each input, and how it is called.

    ``done``: what a report says ("Encoded to"). ``read``: a tensor that every rank of the team reads: bytes, or
    numbers as the model takes them; ``values``: of bytes these numbers. ``call``: the sharded result. ``write``: it to
    a path, called by every rank of the team. ``build``: the model without its weights, None where it cannot be;
    ``shape``: what ``read`` would give. ``method``: what is planned.
    """

    command: str
    done: str
    reads: Sequence[str]
    writes: Sequence[str]
    load: Callable[[], nn.Module]
    read: Callable[[nn.Module, Path], Tensor]
    values: Callable[[Tensor], Tensor]
    call: Call
    write: Callable[[Tensor, Path, Team, bool], None]
    build: Callable[[], nn.Module] | None
    shape: Callable[[Any, Path], tuple[int, ...]]
    dtype: torch.dtype
    method: str | None = None


def run(here: Session, request: Request, work: Work, *, check: bool = False) -> None:
    """All inputs, shared out among teams of ranks; a report, and exit code 1 where some of them failed.

    Of one file that was named by itself, whether it can be read is said first, and ends it with exit code 2.
    """
    alone, items = items_of(here, request, work.reads, work.writes)
    if request.dry_run:
        launch.on_rank0(here.group, lambda: dry_run(here, items, work, request.rows))
        return
    todo = [item for item in items if not (request.resume and item.exists)]
    team = team_of(here, None if alone else request.rows)
    job = Job(here, team, work, first(here, work.load).to(here.device), alone and len(todo) == 1, check)
    distpatch.convert_model(job.model, team.group, output="shard")
    started = time.perf_counter()
    results = job.loop(todo)
    distpatch.restore_model(job.model)
    where = {"command": work.command, **here.where(), "rows": team.group.size()}
    numbers = {**where, "seconds": time.perf_counter() - started}
    if told(here, lambda: _report(here, request, work, numbers, items, todo, results)):
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class Job:
    """One rank's part of the work."""

    here: Session
    team: Team
    work: Work
    model: nn.Module
    alone: bool
    check: bool

    def loop(self, todo: list[Item]) -> list[dict[str, Any]]:
        """This team's inputs; on rank 0 the results of all teams, which tell them at the store."""
        store, leads = self.here.group.get_group_store(), self.team.comm.rank == 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = self.here.is_first and self.here.notes.is_terminal and not self.alone
        results = []
        with Progress(*columns, console=self.here.notes, disable=not shown) as bar:
            task = bar.add_task(self.work.command, total=len(todo))
            for item in todo[self.team.index :: self.team.count]:
                results.append(self.attempt(item))
                bar.update(task, completed=store.add(f"{STORE}/done", int(leads)))
            if leads:
                store.set(f"{STORE}/results/{self.team.index}", json.dumps(results))
            while self.here.is_first and (done := store.add(f"{STORE}/done", 0)) < len(todo):
                bar.update(task, completed=done)
                time.sleep(MOMENT_S)
        if not self.here.is_first:
            return results
        keys = [f"{STORE}/results/{team}" for team in range(self.team.count)]
        store.wait(keys, launch.LONG)
        return [result for key in keys for result in json.loads(store.get(key))]

    def attempt(self, item: Item) -> dict[str, Any]:
        """What it took, or which rank failed, and why. The ranks meet after each input: one that is gone ends all."""
        numbers, note, by_others = {}, "", False
        try:
            numbers = self.one(item)
        except Exception as error:  # of the file, the model or the disk: the other inputs are still to be done
            by_others, note = isinstance(error, distpatch.RankError), one_line(error)
            if not isinstance(error, (distpatch.DistPatchError, typer.BadParameter)):
                note = f"{type(error).__name__}: {note}"
        answers = self.team.comm.rendezvous.require_same_call(
            f"distpatch {self.work.command}", str(item.source), {"note": note, "by_others": by_others}
        )
        failed = [(bool(answer["by_others"]), rank, answer["note"]) for rank, answer in enumerate(answers)]
        failed = sorted(found for found in failed if found[2])
        if not failed:
            return numbers
        if self.team.comm.rank == 0:
            _partial(item.output).unlink(missing_ok=True)
        rank = self.team.index * self.team.group.size() + failed[0][1]
        return {"source": str(item.source), "rank": rank, "problem": failed[0][2]}

    def one(self, item: Item) -> dict[str, Any]:
        """Read, call, write; what it took."""
        given = self._values(self._read(item.source))
        line = self.here.progress(self.model, f"{self.work.command} {item.source.name}")
        with torch.inference_mode(), distpatch.trace() as sent, line if self.alone else nullcontext():
            started = time.perf_counter()
            result = self.work.call(self.model, given)
            if self.here.device.type == "cuda":
                torch.cuda.synchronize(self.here.device)
            seconds = time.perf_counter() - started
        self._write(result, item.output)
        numbers = {
            **{"source": str(item.source), "output": str(item.output), "shape": list(result.shape)},
            **{"seconds": seconds, "sent_bytes": sent.sent_bytes, "messages": sent.messages},
            "fallbacks": sum(fallback.count for fallback in sent.fallbacks),
        }
        return {**numbers, "error": self._difference(given, result)} if self.check else numbers

    def _read(self, path: Path) -> Tensor:
        """The same on every rank of the team, or the same error on all."""
        if self.alone:
            return first(self.here, lambda: self.work.read(self.model, path))

        def read() -> tuple[tuple[Tensor | None, str], str]:
            try:
                given = self.work.read(self.model, path)
            except typer.BadParameter as error:
                return (None, error.message), error.message
            return (given, ""), f"{tuple(given.shape)} {given.dtype}"

        given, problem = together(self.team.comm, "read", read, f"{path}: cannot be read")
        if given is None:
            raise typer.BadParameter(problem)
        return given

    def _values(self, given: Tensor) -> Tensor:
        """On the device, in the model's dtype; of bytes only this rank's rows are made numbers."""
        if given.is_floating_point():
            return given.to(self.here.device, self.work.dtype)
        rows = distpatch.shard(given, self.team.group).to(self.here.device)
        return self.work.values(rows.float()).to(self.work.dtype)

    def _write(self, result: Tensor, output: Path) -> None:
        """Under another name until it is complete."""
        partial = _partial(output)
        self.work.write(result, partial, self.team, self.alone)

        def rename() -> tuple[None, str]:
            if self.team.comm.rank == 0:
                os.replace(partial, output)
            return None, ""

        together(self.team.comm, "write", rename, f"{output} could not be written")

    def _difference(self, given: Tensor, result: Tensor) -> float | None:
        """The largest difference of a sharded result from one process, over its largest value; on the first rank."""
        given, whole = distpatch.gather((given, result))
        distpatch.restore_model(self.model)

        def compare() -> float:
            with torch.inference_mode(), self.here.progress(self.model, "one process") if self.alone else nullcontext():
                alone = self.work.call(self.model, given)
            return ((alone.double() - whole.double()).abs().max() / alone.double().abs().max()).item()

        found = launch.on_rank0(self.team.group, compare)
        distpatch.convert_model(self.model, self.team.group, output="shard")
        return found


def _partial(output: Path) -> Path:
    return output.with_name(f".{output.stem}.partial{output.suffix}")


def _report(
    here: Session,
    request: Request,
    work: Work,
    numbers: dict[str, Any],
    items: list[Item],
    todo: list[Item],
    results: list[dict[str, Any]],
) -> bool:
    """Print what was done, on rank 0; whether some of it failed."""
    if len(results) == len(items) == 1 and "output" in results[0]:
        numbers = {**numbers, **results[0]}
        here.report(numbers, summary(numbers, work.done))
        return False
    failed = [result for result in results if "output" not in result]
    done = [result for result in results if "output" in result]
    here.report(
        {**numbers, "files": done, "there_already": len(items) - len(todo), "failed": failed},
        f"{work.done} {request.output}: {len(done)} of {len(items)} in {numbers['seconds']:.2f} s on "
        f"{numbers['ranks']} rank(s) of {numbers['device']}, {numbers['rows']} to share a file"
        + (f"; {len(items) - len(todo)} were there already" if len(todo) < len(items) else "")
        + (f"; {len(failed)} failed" if failed else ""),
    )
    for result in failed:
        file = "" if result["problem"].startswith(result["source"]) else f"{result['source']}: "
        typer.echo(f"error: rank {result['rank']}: {file}{result['problem']}", err=True)
    return bool(failed)


def summary(numbers: dict[str, Any], done: str) -> str:
    """One line a result, as a person reads it."""
    shape = " x ".join(map(str, numbers["shape"]))
    on = f"in {numbers['seconds']:.2f} s on {numbers['ranks']} rank(s) of {numbers['device']}"
    text = f"{done} {shape} {on}: {numbers['output']}"
    if numbers["fallbacks"]:
        text += f"\n{numbers['fallbacks']} operation(s) were gathered: no sharded rule"
    if numbers.get("error") is not None:
        text += f"\nLargest difference from one process: {numbers['error']:.1e} of the largest value"
    return text
