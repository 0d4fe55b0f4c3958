"""distpatch beside every system that can do (part of) its job, on the same networks.

    python -m benchmarks.peers --install                # the peers, each where its pins cannot clash: out/peers/
    python -m benchmarks.peers --size 512 --rounds 3 --json peers.json --plot peers.png

Two networks: Stable Diffusion's decoder, and a stack of convolution, GroupNorm and SiLU. Random weights, fp32, on
GPUs where there are any. All peers are started once and take turns; a peer of several ranks has one thread each, a
peer of one process as many threads as the others have ranks. One that fails is shown as failed, with what it says.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks._harness.crew import Crew
from benchmarks._harness.printed import machine, said, wide_console
from benchmarks._harness.resident import PROMPT_FREE
from benchmarks.peers.report import LEGEND, Result, plot, show

ROOT = Path(__file__).parents[2]
WORKER = "benchmarks.peers.worker"
INSTALLED = ROOT / "out" / "peers"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Peer:
    """One contestant: ``run`` names its function in contestants.py; ``packages`` what pip installs for it.

    ``own_python``: it has an environment of its own, because its dependencies clash with or exceed the others'.
    """

    name: str
    run: str
    sharded: bool = True
    packages: tuple[str, ...] = ()
    own_python: bool = False

    @property
    def folder(self) -> Path:
        return INSTALLED / self.run

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python") if self.own_python else sys.executable

    @property
    def is_installed(self) -> bool:
        return not self.packages or (self.folder / "installed").exists()

    def environment(self) -> dict[str, str]:
        extra = [str(self.folder)] if self.packages and not self.own_python else []
        return {"PYTHONPATH": ":".join([*extra, str(ROOT)])}


REFERENCE = Peer("one process", "one_process", sharded=False)
PEERS = (
    REFERENCE,
    Peer("distpatch", "distpatch"),
    Peer("DistVAE 0.1.0", "distvae", packages=("distvae==0.1.0",)),
    Peer("DTensor", "dtensor"),
    Peer(
        "ShardTensor (PhysicsNeMo 2.2.2)",
        "shard_tensor",
        packages=("nvidia-physicsnemo==2.2.2", "diffusers", "typer", "rich"),
        own_python=True,
    ),
    Peer("patch_conv 0.0.1b0", "patch_conv", sharded=False, packages=("patch_conv==0.0.1b0",)),
    Peer("diffusers tiling", "tiling", sharded=False),
)


class Bench:
    """All peers on one network."""

    def __init__(self, peers: list[Peer], config: dict[str, Any], ranks: int, bar: Progress) -> None:
        self.config, self.ranks, self.bar = config, ranks, bar
        self.peers = peers
        self.results = [
            Result(peer.name, config["workload"], config["size"], ranks if peer.sharded else 1) for peer in peers
        ]

    def run(self, rounds: int) -> list[Result]:
        for peer, result in zip(self.peers, self.results, strict=True):
            if not peer.is_installed:
                result.problem = "not installed: python -m benchmarks.peers --install"
        with self._crews() as crews:
            for order in ["warm_up", *["time"] * rounds]:
                for result, crew in crews:
                    answers = self._ask(result, crew, order)
                    if order == "time" and answers:
                        result.seconds.append(max(answer["seconds"] for answer in answers))
        with tempfile.TemporaryDirectory() as folder, self._crews(**PROMPT_FREE) as crews:
            path = str(Path(folder) / "result.pt")
            for result, crew in crews:
                self._measure(result, crew, path)
        return self.results

    def _measure(self, result: Result, crew: Crew, path: str) -> None:
        """Memory, traffic and exactness, in fresh processes; the reference goes first."""
        for order, numbers in (
            ("resident", ("resident_bytes",)),
            ("live", ("live_bytes",)),
            ("traffic", ("sent_bytes", "calls")),
        ):
            answers = self._ask(result, crew, order)
            for number in numbers if answers else ():
                setattr(result, number, max(answer[number] for answer in answers))
        if result.problem:
            return
        if result.peer == REFERENCE.name:
            crew.ask("save", path=path)
        result.versions = crew.ask("versions")[0]["versions"]
        answers = self._ask(result, crew, "compare", path=path)
        if answers:
            result.error = max(answer["error"] for answer in answers)

    @contextmanager
    def _crews(self, **env: str) -> Iterator[list[tuple[Result, Crew]]]:
        """The processes of all peers that have not failed yet."""
        with ExitStack() as stack:
            crews = []
            for peer, result in zip(self.peers, self.results, strict=True):
                if result.problem:
                    continue
                config = {**self.config, "peer": peer.run, "ranks": result.ranks}
                threads = 1 if peer.sharded else self.ranks
                crew = Crew(WORKER, config, result.ranks, threads, python=peer.python, **peer.environment(), **env)
                crews.append((result, stack.enter_context(crew)))
            yield crews

    def _ask(self, result: Result, crew: Crew, order: str, **details: Any) -> list[dict[str, Any]]:
        """All ranks' answers; none where the peer has failed, which the result then says."""
        self.bar.update(self.bar.task_ids[0], description=f"{result.workload}, {result.peer}: {order}")
        if result.problem:
            return []
        try:
            answers = crew.ask(order, **details)
        except (RuntimeError, BrokenPipeError) as error:  # a process ended
            result.problem = str(error)
            crew.kill()
            return []
        problems = [answer["problem"] for answer in answers if "problem" in answer]
        if problems:
            result.problem = problems[0]
            crew.kill()
            return []
        return answers


def install(peers: list[Peer], console: Console) -> None:
    """With pip, each into a folder of its own; those with an environment of their own get the torch of this one."""
    constraints = ["--quiet", "--constraint", str(ROOT / "constraints.txt")]
    for peer in peers:
        if peer.is_installed:
            continue
        console.print(f"installing {peer.name} into {peer.folder}")
        try:
            if peer.own_python:
                subprocess.run([sys.executable, "-m", "venv", str(peer.folder)], check=True)
                subprocess.run([peer.python, "-m", "pip", "install", *constraints, *peer.packages], check=True)
            else:
                where = ["--no-deps", "--target", str(peer.folder)]
                subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *where, *peer.packages], check=True)
        except subprocess.CalledProcessError as error:
            console.print(f"{peer.name} cannot be installed here: pip ended with {error.returncode}")
            continue
        (peer.folder / "installed").touch()


@app.command()
def main(
    size: Annotated[int, typer.Option(min=64, help="Side of the picture, a multiple of 16.")] = 512,
    ranks: Annotated[int, typer.Option(min=2, help="Of every sharded peer.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often each peer is timed.")] = 3,
    workload: Annotated[Literal["decode", "stack", "both"], typer.Option()] = "both",
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(peer.run for peer in PEERS[1:])}; several times for several."),
    ] = None,
    memory_format: Annotated[Literal["NCHW", "channels_last"], typer.Option()] = "NCHW",
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="GPUs where there are any, one a rank, if not given.")
    ] = None,
    install_first: Annotated[bool, typer.Option("--install", help="Install the peers, and stop.")] = False,
    read_file: Annotated[
        Path | None, typer.Option("--from", exists=True, help="Measure nothing: show what --json wrote here.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw them here.")] = None,
) -> None:
    """Every peer on the same networks: time, memory, traffic and error."""
    console = wide_console()
    if unknown := set(only or ()) - {peer.run for peer in PEERS}:
        raise typer.BadParameter(f"--only: there is no peer {', '.join(sorted(unknown))}")
    if size % 16:
        raise typer.BadParameter("--size: a multiple of 16")
    peers = [peer for peer in PEERS if not only or peer.run in only or peer is REFERENCE]
    if install_first:
        return install(peers, console)
    if read_file is not None:
        report = json.loads(read_file.read_text())
        results = [Result(**result) for result in report["results"]]
    else:
        report = {"machine": machine(), "ranks": ranks, "rounds": rounds, "memory_format": memory_format}
        results = []
    about = report["machine"]
    console.print(said(about, f"{report['ranks']} ranks", f"{report['rounds']} rounds"))
    if read_file is not None:
        for name in dict.fromkeys(result.workload for result in results):
            show([result for result in results if result.workload == name], console)
    else:
        with Progress(console=console, transient=True) as bar:
            bar.add_task("starting", total=None)
            for name in ("decode", "stack") if workload == "both" else (workload,):
                config = {"workload": name, "size": size, "memory_format": memory_format, "device": device}
                measured = Bench(peers, config, ranks, bar).run(rounds)
                show(measured, console)
                results += measured
    console.print(LEGEND)
    if json_file is not None:
        report["results"] = [asdict(result) for result in results]
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if plot_file is not None:
        plot(results, plot_file)


if __name__ == "__main__":
    app()
