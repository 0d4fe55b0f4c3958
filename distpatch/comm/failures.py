"""How the ranks of a group learn which of them failed: the first note that is left at the store counts, for all."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

from distpatch.comm.processes import Processes
from distpatch.comm.rendezvous import GRACE, Missing, Rendezvous
from distpatch.torch_utils import private

T = TypeVar("T")
ANSWER_S = 1.0  # that the store may take: it may be the rank that failed that keeps it
PAUSE_S = 0.05


@dataclass(frozen=True)
class Note:
    """Which rank failed first, and how: "raised ValueError: ..."."""

    rank: int
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank} {self.text}"


class Failures:
    """Of one connection of a group. ``first``: the failure that counts, as soon as this rank knows one.

    ``patience``: seconds that a process may be stopped, or a host silent, before it counts as gone; None: for ever.
    """

    def __init__(self, rendezvous: Rendezvous, processes: Processes, connection: str) -> None:
        self.rendezvous, self.processes = rendezvous, processes
        self.store = private.own_connection(rendezvous.store)
        self.first: Note | None = None
        self.patience: float | None = None
        self._key, self._alive = rendezvous.key(f"note/{connection}"), rendezvous.key("alive")
        self._signs = 0

    def report(self, rank: int, text: str) -> Note:
        """Leave a note of a failure; returns the one that counts."""
        if self.first is None:
            mine = Note(rank, text)
            said = _answer(lambda: self.store.compare_set(self._key, "", json.dumps(asdict(mine))).decode())
            self.first = Note(**json.loads(said)) if said else mine
        return self.first

    def look(self) -> Note | None:
        """The note that somebody has left, or one of a rank that is gone."""
        if self.first is None and (gone := self.gone()):
            self.report(*next(iter(gone.items())))
        if self.first is None:
            said = _answer(lambda: self.store.get(self._key).decode() if self.store.check([self._key]) else "")
            self.first = Note(**json.loads(said)) if said else None
        return self.first

    def find(self) -> Note | None:
        """As ``look``, of a failure that was noticed just now: its note, or the end of its process, may come later."""
        deadline = time.monotonic() + min(GRACE, self.rendezvous.timeout).total_seconds()
        while (note := self.look()) is None and time.monotonic() < deadline:
            time.sleep(PAUSE_S)
        return note

    def gone(self) -> Missing:
        """Ranks whose processes have ended or are stopped, or whose hosts are silent."""
        return self.processes.gone(self.patience) or self.processes.silent(self._sign_of, self.patience)

    def give_sign(self) -> None:
        """Tell the ranks of other hosts that this one lives."""
        if self.processes.listens_to is not None:
            self._signs += 1
            _answer(lambda: self.store.set(f"{self._alive}/{self.rendezvous.rank}", str(self._signs)))

    def _sign_of(self, rank: int) -> str:
        key = f"{self._alive}/{rank}"
        return _answer(lambda: self.store.get(key).decode() if self.store.check([key]) else "") or ""


def _answer(request: Callable[[], T]) -> T | None:
    """What the store answers, or None where it does not: it is lost, or kept by a process that is stopped."""
    answers: list[T] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(request())

    asking = threading.Thread(target=ask, name="distpatch store", daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    return answers[0] if answers else None
