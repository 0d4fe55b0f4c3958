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
        elsewhere = [r for r, p in enumerate(ranks) if r != rank and (not host or p.host != host)]
        # One rank of the others is listened to, the next one: so every rank is, by somebody, whatever their number.
        self.listens_to = min(elsewhere, key=lambda r: (r - rank) % len(ranks), default=None)
        self._since: dict[int, float] = {}  # when a rank was first seen stopped
        self._heard: tuple[str, float] = "", 0.0

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

    def silent(self, read: Callable[[int], str], patience: float | None) -> dict[int, str]:
        """The rank of another host that is listened to, if it gives no sign for too long; ``read``: its last one."""
        if self.listens_to is None or patience is None:
            return {}
        sign, now = read(self.listens_to), time.monotonic()
        if sign != self._heard[0] or not self._heard[1]:
            self._heard = sign, now
        if now - self._heard[1] <= FARTHER * patience:
            return {}
        return {self.listens_to: "gives no sign of life: its process is stopped or has ended, or its host is lost"}

    def listen_anew(self) -> None:
        """What was not heard until now counts no more."""
        self._heard = "", 0.0
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
