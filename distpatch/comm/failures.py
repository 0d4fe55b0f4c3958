"""How the ranks of a group learn which of them failed: the first note that is left at the store counts, for all."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
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
    ``transfers``: how many this rank has begun, in the same order as all others. ``waiting_since``: when it began to
    wait for one, None where it does not. A wait that ends before all has landed (``Transport.lands_later``) leaves the
    host to wait anywhere: there it is when the first wait of a call began, until the call is known to be whole.
    ``in_call``: that will be asked at its end.
    """

    def __init__(self, rendezvous: Rendezvous, processes: Processes, connection: str) -> None:
        self.rendezvous, self.processes = rendezvous, processes
        self.store = private.own_connection(rendezvous.store)
        self.first: Note | None = None
        self.patience: float | None = None
        self._key, self._alive = rendezvous.key(f"note/{connection}"), rendezvous.key("alive")
        self._left = rendezvous.key(f"left/{connection}")
        self.transfers = self._signs = 0
        self.waiting_since: float | None = None
        self.in_call = False
        self._one_at_a_time = threading.RLock()
        self._asking: threading.Thread | None = None  # a request that the store may not have answered
        self.give_sign()

    def report(self, rank: int, text: str) -> Note:
        """Leave a note of a failure; returns the one that counts."""
        if self.first is None:
            mine = Note(rank, text)
            said = self._answer(lambda: self.store.compare_set(self._key, "", json.dumps(asdict(mine))).decode())
            self.first = Note(**json.loads(said)) if said else mine
        return self.first

    def look(self) -> Note | None:
        """The note that somebody has left, or one of a rank that is gone."""
        if self.first is None:
            for rank, why in self.gone().items():
                if not self._has_done_its_part(rank):
                    self.report(rank, why)
                    break
        if self.first is None:
            said = self._answer(lambda: self.store.get(self._key).decode() if self.store.check([self._key]) else "")
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
        return self.processes.gone(self.patience) or self.processes.silent(self._signs_of, self.patience)

    def leave(self) -> None:
        """Say that this rank ends with all its transfers done: nobody who still waits for others waits for it."""
        if self.first is None and self.waiting_since is None:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"{self._left}/{self.rendezvous.rank}", str(self.transfers))

    def _has_done_its_part(self, rank: int) -> bool:
        return int(self._read([f"{self._left}/{rank}"])[0] or 0) >= max(self.transfers, 1)

    def give_sign(self) -> None:
        """Tell the ranks of other hosts that this one lives."""
        if self.processes.elsewhere:
            self._signs += 1
            self._answer(lambda: self.store.set(f"{self._alive}/{self.rendezvous.rank}", str(self._signs)))

    def _signs_of(self, ranks: Sequence[int]) -> list[str]:
        return self._read([f"{self._alive}/{rank}" for rank in ranks])

    def _read(self, keys: list[str]) -> list[str]:
        """What the store has of each; empty: nothing, or it does not answer."""

        def read(keys: list[str]) -> list[str]:
            return [value.decode() for value in self.store.multi_get(keys)] if self.store.check(keys) else [""]

        nothing = [""] * len(keys)
        found = self._answer(lambda: read(keys)) or nothing
        if len(found) == len(keys):
            return found
        return self._answer(lambda: [read([key])[0] for key in keys]) or nothing  # one of them is not there

    def _answer(self, request: Callable[[], T]) -> T | None:
        """What the store answers, or None where it does not: it is lost, or kept by a process that is stopped."""
        answers: list[T] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(request())

        with self._one_at_a_time:
            if self._asking is not None:
                self._asking.join(PAUSE_S)
                if self._asking.is_alive():
                    return None
            self._asking = threading.Thread(target=ask, name="distpatch store", daemon=True)
            self._asking.start()
            self._asking.join(ANSWER_S)
        return answers[0] if answers else None
