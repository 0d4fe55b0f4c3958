"""Whether the processes of a group's ranks run: those of this host are looked at, the others must be heard of.

A process of this host that computes for an hour is seen to run, and one that is stopped or has ended is seen at once.
Of another host only a sign of life, which its ranks write to the store, can tell.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

STARTED = 19  # fields of /proc/PID/stat from the state on: when the process was started
ENDED, STOPPED = frozenset("ZXx"), frozenset("Tt")
FARTHER = 3.0  # times the patience for a host that is not heard of: nothing but its silence tells


@dataclass(frozen=True)
class Process:
    """``host``: of processes that see each other, if it is known; ``started``: tells two of one number."""

    host: str
    pid: int
    started: str

    @staticmethod
    def own() -> Process:
        return Process(_host(), os.getpid(), _stat(os.getpid())[1])


class Processes:
    """Those of a group's ranks, as this rank sees them."""

    def __init__(self, ranks: Sequence[Process], rank: int) -> None:
        host = ranks[rank].host
        self.here = {r: p for r, p in enumerate(ranks) if host and p.host == host and p != ranks[rank]}
        self.elsewhere = [r for r, p in enumerate(ranks) if r != rank and (not host or p.host != host)]
        self._since: dict[int, float] = {}  # when a rank was first seen stopped
        self._heard: dict[int, tuple[str, float]] = {}  # the last sign of life of a rank, and when it was new

    def gone(self, patience: float | None) -> dict[int, str]:
        """The ranks of this host that have ended, or are stopped for longer than ``patience`` seconds, and how so."""
        found = {}
        for rank, process in self.here.items():
            state, started = _stat(process.pid)
            if not state or state in ENDED or started != process.started:
                found[rank] = f"has ended (process {process.pid})"
            elif state not in STOPPED:
                self._since.pop(rank, None)
            elif patience is not None and time.monotonic() - self._since.setdefault(rank, time.monotonic()) > patience:
                found[rank] = f"is stopped (process {process.pid})"
        return found

    def silent(self, read: Callable[[Sequence[int]], Sequence[str]], patience: float | None) -> dict[int, str]:
        """The ranks of other hosts that give no sign for too long; ``read``: the last one of each."""
        if not self.elsewhere or patience is None:
            return {}
        found = {}
        for rank, sign in zip(self.elsewhere, read(self.elsewhere), strict=True):
            now = time.monotonic()
            if self._heard.setdefault(rank, (sign, now))[0] != sign:
                self._heard[rank] = sign, now
            if now - self._heard[rank][1] > FARTHER * patience:
                found[rank] = "gives no sign of life: its process is stopped or has ended, or its host is lost"
        return found

    def listen_anew(self) -> None:
        """What was not heard until now counts no more."""
        self._heard.clear()
        self._since.clear()


def identity() -> dict[str, object]:
    """As ranks tell it to each other; ``Process(**...)`` of it."""
    return asdict(Process.own())


def _host() -> str:
    """Of the kernel that runs, and the processes that it shows to each other; nothing where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str]:
    """State and start of a process of this host; nothing where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[STARTED]
