"""What every sub-command does around its work: the group, where it prints, and how it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import typer
from rich.console import Console, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

from distpatch import launch
from distpatch.errors import DistPatchError

T = TypeVar("T")
FAILED, WRONG_INPUT, FAULT = 1, 2, 3
Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class Session:
    """One rank's part of a command. ``patience``: how long it waits for another rank; None: torch's default.

    ``notes`` prints for the person who waits, on standard error, and ``report`` the result, on standard output:
    both on rank 0 only.
    """

    group: dist.ProcessGroup
    device: torch.device
    as_json: bool
    patience: timedelta | None

    @property
    def is_first(self) -> bool:
        return self.group.rank() == 0

    @property
    def notes(self) -> Console:
        return Console(stderr=True, quiet=not self.is_first)

    def report(self, numbers: dict[str, Any], text: RenderableType, *, by: int = 0) -> None:
        """The numbers as JSON, or the text, from one rank."""
        if self.group.rank() != by:
            return
        if self.as_json:
            print(json.dumps(numbers, indent=1))
        else:
            Console(soft_wrap=True).print(text)

    def where(self) -> dict[str, Any]:
        """What a result has to be read with."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {"ranks": self.group.size(), "device": name, "torch": torch.__version__}

    @contextmanager
    def progress(self, model: nn.Module, what: str) -> Iterator[None]:
        """A line on rank 0 while the model runs: the time, and how many layers are done.

        A model does not say how often it will call its layers, so there is no percentage.
        """
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]  # no hooks
        leaves = [module for module in modules if not any(True for _ in module.children())]
        with Progress(*columns, console=self.notes, transient=True, disable=not self.is_first) as bar:
            task, done = bar.add_task(what), 0

            def count(*_: Any) -> None:
                nonlocal done
                done += 1
                bar.update(task, description=f"{what}: {done} layers done")

            hooks = [leaf.register_forward_hook(count) for leaf in leaves] if self.is_first else []
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()


@contextmanager
def session(
    *,
    as_json: bool,
    device: Device | None = None,
    threads: int | None = None,
    timeout: float | None = None,
    failed: int = FAILED,
) -> Iterator[Session]:
    """The group of all ranks and this rank's part of it.

    distpatch's own errors end it with the exit code ``failed`` and without a traceback.
    """
    patience = None if timeout is None else timedelta(seconds=timeout)
    try:
        with launch.process_group(threads=threads, device=device, timeout=patience) as (group, place):
            yield Session(group, place, as_json, patience)
    except DistPatchError as error:
        rank = f"rank {dist.get_rank()}: " if dist.is_initialized() else ""
        print(f"error: {rank}{error}", file=sys.stderr, flush=True)
        raise typer.Exit(failed) from error


def parse_shape(text: str) -> tuple[int, ...]:
    """``1,4,64,64`` as numbers. Raises ``typer.BadParameter`` for anything else."""
    try:
        shape = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if len(shape) < 4 or min(shape) < 1:
        raise typer.BadParameter(
            f"{text!r}: a shape is at least 4 numbers, batch, channels and sizes, such as 1,4,64,64 "
            "(or 1,16,21,90,160 for a video)"
        )
    return shape


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``512`` or ``512x768`` as rows and columns. Raises ``typer.BadParameter`` for anything else."""
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise typer.BadParameter(f"--size is such as 512, or 512x768 for rows and columns; got {text}")
    return int(sides[0]), int(sides[-1])


def first(session: Session, load: Callable[[], Any]) -> Any:
    """Load on rank 0 first, which says for all what is wrong."""
    return launch.rank0_first(session.group, load)


def told(session: Session, work: Callable[[], T]) -> T:
    """What rank 0 found out, on every rank: what JSON can say. Where it fails, rank 0 says why and all ranks end."""
    store = session.group.get_group_store()
    key = f"distpatch/cli/told/{store.add(f'distpatch/cli/told/calls/{session.group.rank()}', 1)}"
    launch.on_rank0(session.group, lambda: store.set(key, json.dumps(work())))
    found: T = json.loads(store.get(key))
    return found
