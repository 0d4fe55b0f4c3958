"""The handshake: ranks meet at a key-value store, which can time out without harming any process group.

A meeting costs a rank three requests, however many ranks there are: it adds to a counter a number that is made of what
it brings; the last one to come sees in the sum whether all have brought the same, and writes the verdict that the
others wait for. Only where they have not does every rank write, and read, what each has brought.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import Store

from distpatch.errors import RankError
from distpatch.torch_utils import private

GRACE = timedelta(seconds=2)  # between the first and the last rank that notices a failed collective
GLANCE = timedelta(seconds=0.5)  # in which those who wait for the same verdict say what they have brought
MOMENT = timedelta(seconds=30)  # in which all say it who have come
RANK = 1 << 36  # a rank on the counter; smaller parts of the sum are what they have brought
MOST = 1 << 61  # that a counter may hold
DIFFER, LATE = "differ", "late"  # verdicts; others are the digest of what all have brought, or a list of those missing
Payload = dict[str, object]
Missing = dict[int, str]  # ranks that have not come, and why if that is known


@dataclass(frozen=True)
class Arrival:
    """This rank's part in a meeting. ``share``: what it adds to the counter, besides ``RANK``."""

    call: int
    text: str
    digest: str
    share: int


class Rendezvous:
    """One rank's place among those that meet at ``store``. ``call``: how many times they have met so far.

    ``waiting``: for which verdict this rank waits, and since when.
    """

    has_peers = True  # other ranks may exist that can be told something

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        # A connection of its own: who waits at one makes everybody wait who uses it.
        self.store, self.rank, self.size, self.timeout = private.own_connection(store), rank, size, timeout
        self.call = 0
        self.waiting: tuple[str, float] | None = None
        self._prefix = ""
        self._counter, self._counted = 0, 0  # the counter's number, and what it held after the last meeting
        self._arrival: Arrival | None = None  # at a meeting whose verdict this rank has not seen
        self._answered = ""  # a key that this rank has written, until the next meeting

    def key(self, name: str) -> str:
        """As the ranks of this rendezvous alone have it: of this group, and of this start of the program."""
        if not self._prefix:
            attempt = f"distpatch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            opened = self.store.add(f"{attempt}/{self.rank}/opened", 1)
            self._prefix = f"{attempt}/{opened}"
        return f"{self._prefix}/{name}"

    def require_same_call(
        self, what: str, signature: str | Callable[[], str], payload: Payload | None = None
    ) -> list[Payload]:
        """Meet all ranks of the group, which must all come with the same signature.

        Returns every rank's payload. Raises ``RankError`` on every rank if one is missing for longer
        than the group's timeout, has ended, or came with something else. The first rank that knows the outcome
        writes the verdict, and all follow it: a rank that arrives as the others give up cannot go on
        alone.
        """
        if self.size == 1:
            return [payload or {}]
        signature = signature if isinstance(signature, str) else signature()
        answers, missing = self.collect({"what": what, "signature": signature, **(payload or {})}, self.timeout)
        if missing:
            known = ", ".join(f"rank {rank} {why}" for rank, why in missing.items() if why)
            within = f": {known}" if known else f" within {self.timeout.total_seconds():g} s"
            raise RankError(
                f"{what}: rank(s) {list(missing)} of {self.size} did not call it{within} (this is rank {self.rank}). "
                "Every rank of the group must make the same calls in the same order."
            )
        if len({(answer["what"], answer["signature"]) for answer in answers}) > 1:
            called = "\n".join(
                f"  rank {rank}: {answer['what']} {answer['signature']}" for rank, answer in enumerate(answers)
            )
            raise RankError(f"the ranks were called differently (this is rank {self.rank}):\n{called}")
        return answers

    def collect(self, mine: Payload, patience: timedelta) -> tuple[list[dict[str, Any]], Missing]:
        """Meet all ranks: what every rank brought, and the ranks that did not come within ``patience``.

        Where one is missing there are no answers.
        """
        if self.size == 1:
            return [mine], {}
        self._follow_up()
        text = json.dumps(mine)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.call += 1
        arrival = self._arrival = Arrival(self.call, text, digest, int(digest[:16], 16) % (RANK // self.size))
        verdict = self._arrive(arrival, patience)
        self._count(arrival, verdict)
        if verdict == digest:
            return [json.loads(text) for _ in range(self.size)], {}
        return self._answers(arrival, verdict)

    def _arrive(self, arrival: Arrival, patience: timedelta) -> str:
        share, verdict_key = RANK + arrival.share, self._verdict_key(arrival.call)
        total = self.store.add(self.key(f"arrived/{self._counter}"), share) - self._counted
        if total // RANK < self.size:
            return self._wait_for_verdict(verdict_key, patience)
        verdict = arrival.digest if total == self.size * share else DIFFER
        decided = self.store.compare_set(verdict_key, "", verdict).decode()
        if arrival.call > 1:  # everyone has passed the meeting before
            self.store.delete_key(self._verdict_key(arrival.call - 1))
        return decided

    def _wait_for_verdict(self, key: str, patience: timedelta) -> str:
        """The verdict: this rank's own where it is the first to lose patience."""
        self.waiting = key, time.monotonic()
        try:
            came = self._wait([key], patience)
        finally:
            self.waiting = None
        return (self.store.get(key) if came else self.store.compare_set(key, "", LATE)).decode()

    def refuse(self, waiting: str, store: Store, missing: Missing) -> None:
        """End the meeting that this rank waits at (``waiting``): these ranks will not come. In another thread."""
        store.compare_set(waiting, "", json.dumps(missing))

    def _wait(self, keys: Sequence[str], patience: timedelta) -> bool:
        """Whether all keys are there, within the patience."""
        try:
            self.store.wait(list(keys), patience)
            return True
        except RuntimeError as error:
            if "timeout" not in str(error).lower():
                lost = f"the store where the ranks meet is lost (this is rank {self.rank}): {error}"
                raise RankError(lost) from error
            return False

    def _count(self, arrival: Arrival, verdict: str) -> None:
        """What the counter holds now, as all ranks know; where they do not, another one takes its place."""
        self._arrival = None
        self._counted += self.size * (RANK + arrival.share)
        if verdict != arrival.digest or self._counted > MOST:
            self._counter, self._counted = self._counter + 1, 0
        if self._answered:
            self.store.delete_key(self._answered)
            self._answered = ""

    def _follow_up(self) -> None:
        """A meeting that this rank was torn out of, by an interrupt: the others may have gone on, or wait."""
        if self._arrival is not None:
            self._count(self._arrival, self._wait_for_verdict(self._verdict_key(self._arrival.call), GRACE))

    def _answers(self, arrival: Arrival, verdict: str) -> tuple[list[dict[str, Any]], Missing]:
        """What each rank has brought, where that differs; or who is missing."""
        if verdict.startswith("{"):
            return [], {int(rank): why for rank, why in json.loads(verdict).items()}
        keys = [self.key(f"{arrival.call}/brought/{rank}") for rank in range(self.size)]
        self._answered = keys[self.rank]
        self.store.set(self._answered, arrival.text)
        missing: Missing = {}
        if not self._wait(keys, GLANCE if verdict == LATE else MOMENT):
            missing = {rank: "" for rank, key in enumerate(keys) if not self.store.check([key])}
        decided = self.store.compare_set(self.key(f"{arrival.call}/missing"), "", json.dumps(missing))
        missing = {int(rank): why for rank, why in json.loads(decided).items()}
        return ([] if missing else [json.loads(answer) for answer in self.store.multi_get(keys)]), missing

    def new_name(self, label: str) -> str:
        """A name that all who met last have alike, and that no other meeting gives."""
        number = self.call if self.size > 1 else self.store.add("distpatch/alone", 1)
        return f"distpatch {label} {self.key(str(number))}"

    def _verdict_key(self, call: int) -> str:
        return self.key(f"{call}/verdict")


class NoPeers(Rendezvous):
    """Of a rank that is alone, or whose group is simulated: there is nobody to meet, and nobody to tell."""

    has_peers = False

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self.timeout, self.call = rank, size, GRACE, 0

    def require_same_call(
        self, what: str, signature: str | Callable[[], str], payload: Payload | None = None
    ) -> list[Payload]:
        return [payload or {}] * self.size

    def collect(self, mine: Payload, patience: timedelta) -> tuple[list[dict[str, Any]], Missing]:
        return [mine] * self.size, {}
