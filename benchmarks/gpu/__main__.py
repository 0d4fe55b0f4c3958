"""``python -m benchmarks.gpu``: everything that one GPU (or several, or a CPU) can show of distpatch, in minutes.

    python -m benchmarks.gpu --minutes 8 --json gpu.json | tee gpu.md

Each section runs in a process of its own with a share of the time; one that fails, runs out of memory or hangs is
written down, and the next one starts. Ends with 0 if it ran to its end; with ``--strict`` only if nothing failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import distpatch
from benchmarks.gpu.environment import set_precision
from benchmarks.gpu.report import table, with_status
from benchmarks.gpu.section import BEGUN, FAILED, NOT_RUN, Row, Section, Where, reason, written

assert distpatch  # imported once, before the sections are forked
if torch.version.cuda is None:  # custom operators import it at their first call; on a GPU's host it might look for GPUs
    import torch._dynamo

SECTIONS = {  # in order of value: title, module, share of the time
    "environment": ("what the figures have to be read with", "environment", 20),
    "convolution": ("128 to 128 channels, 3 by 3, by elements of the input", "convolution", 75),
    "decode": ("on one device", "decode", 120),
    "threads": ("ranks as threads on one device, late messages", "threads", 100),
    "processes": ("ranks as processes on one device, over gloo", "shared_gpu", 60),
    "single": ("NCCL of one rank, graphs, sanitizers", "single", 60),
    "several": ("ranks on GPUs of their own", "several", 75),
}
MARGIN = 0.92  # of a section's time: no row begins later


def main() -> int:
    options = _options()
    started = time.monotonic()
    wanted = options.only or list(SECTIONS)
    where, sections = Where(), {}
    for index, name in enumerate(wanted):
        left = options.minutes * 60 - (time.monotonic() - started)
        shares = {n: SECTIONS[n][2] for n in wanted[index:]}
        if where.gpus == 1 and name != "several":
            shares.pop("several", None)
        seconds = left * shares[name] / sum(shares.values())
        print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
        sections[name] = _section(name, where, seconds)
        if name == "environment":
            where = _where(sections[name]["rows"], options)
    report = {
        "kit": 1,
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "minutes": options.minutes,
        "size": where.size,
        "device": _device_name(sections),
        "seconds": time.monotonic() - started,
        "sections": sections,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 1 if options.strict and any(with_status(report, FAILED)) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="in all; what does not fit is not run, and said")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: as without a GPU")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a section; may be repeated")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--strict", action="store_true", help="end with 1 if anything failed")
    options = parser.parse_args()
    if options.only and "environment" not in options.only:
        options.only.insert(0, "environment")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return options


def _where(rows: list[Row], options: argparse.Namespace) -> Where:
    gpus = next((row.get("gpus", 0) for row in rows if row["row"] == "GPUs"), 0)
    return Where(gpus, "tiny" if not gpus else "quick" if options.quick else "full")


def _device_name(sections: dict[str, Any]) -> str:
    rows = {row["row"]: row for row in sections["environment"]["rows"]}
    gpus = [row.get("name") for name, row in rows.items() if name.startswith("GPU ")]
    about = rows.get("processor", {})
    place = f"{len(gpus)} times {gpus[0]}" if gpus else f"{about.get('name')}, {about.get('cores')} cores"
    return f"{place}, torch {rows.get('versions', {}).get('torch')}"


def _section(name: str, where: Where, seconds: float) -> dict[str, Any]:
    """Run a section in a process of its own and, if it does not end in time, end it with all that it started.

    It is forked, so that torch need not be imported again: this process uses no GPU.
    """
    title, module, _ = SECTIONS[name]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        process = multiprocessing.get_context("fork").Process(target=_child, args=(module, where, seconds, path))
        process.start()
        process.join(seconds)
        late = process.is_alive()
        with contextlib.suppress(ProcessLookupError):  # it and what it has started; perhaps all has ended
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        rows = written(path)
    why = f"no end within {seconds:.0f} s" if late else f"the process ended with code {process.exitcode}"
    if process.exitcode != 0 or late:
        begun = [row for row in rows if row["status"] == BEGUN]
        for row in begun:
            row.update(status=FAILED, why=why)
        if not begun:
            rows.append({"row": "the section", "status": FAILED, "why": why})
        if late:
            rows.append({"row": "what would have followed", "status": NOT_RUN, "why": "out of time"})
    return {"title": title, "seconds": time.monotonic() - started, "rows": rows}


def _child(module: str, where: Where, seconds: float, path: Path) -> None:
    os.setsid()
    os.dup2(2, 1)  # the table alone goes to standard output
    warnings.simplefilter("ignore")
    set_precision()
    gc.freeze()  # what was imported is not garbage, and is not looked at after each row
    section = Section(where, path, time.monotonic() + MARGIN * seconds)
    try:
        importlib.import_module(f"benchmarks.gpu.{module}").run(section)
    except BaseException as error:
        with path.open("a") as file:
            file.write(json.dumps({"row": "the section", "status": FAILED, "why": reason(error)}) + "\n")
    sys.stderr.flush()
    os._exit(0)  # what still hangs must not hold up the next section


if __name__ == "__main__":
    sys.exit(main())
