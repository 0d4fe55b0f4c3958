"""``distpatch doctor``: versions, devices, links, whether what ranks send arrives, and what to run a model on."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

import distpatch
from distpatch import launch
from distpatch.cli import options as o
from distpatch.cli.advice import Advice, advise
from distpatch.cli.autoencoder import check_input
from distpatch.cli.machine import lines, machine
from distpatch.cli.models import locate
from distpatch.cli.session import FAULT, Session, parse_shape, session

LIBRARIES = ("torch", "diffusers", "numpy", "tifffile", "pypng", "av", "safetensors")
LINKS_SHOWN = 64
MEASURED_S = 1.0  # in all, of the rates of a device


def doctor(
    model: Annotated[
        Path | None,
        typer.Argument(help="Folder or hub id of a diffusers model, to end in a recommendation: its config is read."),
    ] = None,
    shape: o.ShapeOption = "1,4,64,64",
    method: Annotated[Literal["decode", "encode", "forward"], typer.Option(help="What is called.")] = "decode",
    world_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Ranks to choose from; several times. 1, 2, 4, ... 8 or all, if not given."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a rank waits for another.")] = 30,
    device: o.DeviceOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Test the group: every pair of ranks, halo, gather and sum, with values that are known before.

    It says what the machine is, what is known to be wrong with the versions installed, and what was not looked at. Of a
    model it says on how many ranks to run it, with which options and why, planned at rates that are measured here.

    Exits with 3, and names the pair of ranks, where a message is wrong, is lost, or a rank does not answer.

    Examples:

        torchrun --nproc_per_node=8 -m distpatch doctor

        torchrun --nproc_per_node=8 -m distpatch doctor vae/ --shape 1,4,512,512

        torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 -m distpatch doctor --json
    """
    with session(as_json=as_json, device=device, timeout=timeout, failed=FAULT) as here:
        size = parse_shape(shape)

        def build(precision: torch.dtype) -> nn.Module:
            assert model is not None
            built = locate(model).build(precision)
            check_input(built, method, size, f"--shape {shape}")
            return built

        if model is not None:  # a wrong one is said before anything is measured
            launch.on_rank0(here.group, lambda: build(torch.float32))
        question = Question(build, size, None if method == "forward" else method, world_size)
        report = examine(here, None if model is None else question)
    if not report.ok:
        raise typer.Exit(FAULT)


@dataclass(frozen=True)
class Question:
    """What is asked of a model: as ``advise`` takes it; ``sizes``: world sizes, None for powers of two."""

    build: Callable[[torch.dtype], nn.Module]
    shape: tuple[int, ...]
    method: str | None
    sizes: list[int] | None

    def answer(self, here: Session) -> Advice | None:
        """On rank 0; every rank measures."""
        with here.notes.status("measuring this machine, and planning"):
            device, link = distpatch.calibrate(here.group, device=here.device, seconds=MEASURED_S)
            ranks = here.group.size()
            sizes = self.sizes or sorted({*(1 << n for n in range(max(ranks, 8).bit_length())), ranks})
            answer = partial(advise, self.build, self.shape, self.method, sizes, device, link)
            return launch.on_rank0(here.group, answer)


def examine(here: Session, question: Question | None) -> distpatch.SelfTest:
    """Print what this group is, what its self-test found, and what to run a model on."""
    with here.notes.status(f"testing {here.group.size()} rank(s)"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        report = distpatch.self_test(here.group)
    places = _places(here)
    speaker = min({*range(report.world_size)} - {*report.absent})
    advice = question.answer(here) if question is not None and report.ok else None
    if here.group.rank() == speaker:
        numbers = {"command": "doctor", "versions": versions(), **here.where(), "backend": _backend(here)}
        numbers |= {"places": places, **report.to_json(), "warnings": [str(w.message) for w in said]}
        numbers["machine"] = found = machine()
        numbers["recommendation"] = None if advice is None else advice.to_json()
        if question is None:
            found["not_looked_at"].append("whether a model is host-bound, and its ranks: give it, and --shape")
        here.report(numbers, Group(*_text(numbers, report, advice)), by=speaker)
    sys.stdout.flush()
    _store_and_wait(here, "told", [speaker])  # torchrun ends all ranks when the first one exits with an error
    return report


def versions() -> dict[str, str]:
    """Versions of everything installed that can matter."""
    found = {"distpatch": distpatch.__version__, "python": platform.python_version(), "system": platform.platform()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__  # with the build, which a package's metadata may leave out
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def _backend(here: Session) -> str:
    return str(dist.get_backend_config(here.group))


def _places(here: Session) -> list[str]:
    """Each rank's host and device, of the ranks that answer within seconds."""
    place = f"{socket.gethostname()} {here.where()['device']} {here.device}"
    return _store_and_wait(here, place, list(range(here.group.size())))


def _store_and_wait(here: Session, note: str, ranks: list[int]) -> list[str]:
    """Write this rank's note to the group's store, and read those of the other ranks, for some seconds."""
    store = here.group.get_group_store()
    call = store.add(f"distpatch/doctor/calls/{here.group.rank()}", 1)
    store.set(f"distpatch/doctor/{call}/{here.group.rank()}", note)
    keys = [f"distpatch/doctor/{call}/{rank}" for rank in ranks]
    with suppress(dist.DistStoreError):
        store.wait(keys, launch.MOMENT)
    return [store.get(key).decode() if store.check([key]) else "no answer" for key in keys]


def _text(numbers: dict[str, Any], report: distpatch.SelfTest, advice: Advice | None) -> list[Any]:
    about = Table(show_header=False, box=None)
    for name, version in numbers["versions"].items():
        about.add_row(name, version)
    about.add_row("backend", numbers["backend"])
    for rank, place in enumerate(numbers["places"]):
        about.add_row(f"rank {rank}", place)
    parts: list[Any] = [about, *map(Text, lines(numbers["machine"]))]
    if report.links:
        links = Table(title="Links: both directions at once", title_justify="left")
        for heading in ("ranks", "µs, 4 bytes", "MiB/s, 4 MiB"):
            links.add_column(heading, justify="right")
        for link in sorted(report.links, key=lambda link: link.mib_per_second)[:LINKS_SHOWN]:
            links.add_row("{} {}".format(*link.ranks), f"{link.microseconds:.0f}", f"{link.mib_per_second:.0f}")
        if len(report.links) > LINKS_SHOWN:
            links.caption = f"the {LINKS_SHOWN} slowest of {len(report.links)}"
        parts.append(links)
    parts += [Text(f"FAULT {fault}") for fault in report.faults]
    parts += [Text(f"WARNING {warning}") for warning in numbers["warnings"]]
    if report.ok:
        pairs = report.world_size * (report.world_size - 1) // 2
        parts.append(Text(f"All is well: {pairs} pair(s) of ranks, halo, gather and sum are right."))
    parts += [Text(f"NOT LOOKED AT {what}") for what in numbers["machine"]["not_looked_at"]]
    return parts + [Text(line) for line in (advice.lines() if advice is not None else ())]
