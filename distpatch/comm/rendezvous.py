"""The handshake: ranks meet at a key-value store, which can time out without harming any process group."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from distpatch.errors import RankError

GRACE = timedelta(seconds=2)  # between the first and the last rank that notices a failed collective
Payload = dict[str, object]


class Rendezvous:
    """One rank's place among those that meet at ``store``. ``call``: how many times they have met so far."""

    has_peers = True  # other ranks may exist that can be told something

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.call = 0

    def require_same_call(
        self, what: str, signature: str | Callable[[], str], payload: Payload | None = None
    ) -> list[Payload]:
        """Meet all ranks of the group, which must all come with the same signature.

        Returns every rank's payload. Raises ``RankError`` on every rank if one is missing for longer
        than the group's timeout or came with something else. The first rank that knows the outcome
        writes the verdict, and all follow it: a rank that arrives as the others give up cannot go on
        alone.
        """
        if self.size == 1:
            return [payload or {}]
        signature = signature if isinstance(signature, str) else signature()
        answers, missing = self.collect({"what": what, "signature": signature, **(payload or {})}, self.timeout)
        if missing:
            raise RankError(
                f"{what}: rank(s) {missing} of {self.size} did not call it within "
                f"{self.timeout.total_seconds():g} s (this is rank {self.rank}). Every rank of the "
                "group must make the same calls in the same order."
            )
        if len({(answer["what"], answer["signature"]) for answer in answers}) > 1:
            called = "\n".join(
                f"  rank {rank}: {answer['what']} {answer['signature']}" for rank, answer in enumerate(answers)
            )
            raise RankError(f"the ranks were called differently (this is rank {self.rank}):\n{called}")
        return answers

    def collect(self, mine: Payload, patience: timedelta) -> tuple[list[dict[str, Any]], list[int]]:
        """Meet all ranks: what every rank brought, and the ranks that did not come within ``patience``.

        Where one is missing there are no answers. The first rank that knows the outcome writes the verdict.
        """
        if self.size == 1:
            return [mine], []
        store, size = self.store, self.size
        call = self.call = store.add(f"distpatch/{self.rank}/calls", 1)
        keys = [f"distpatch/{call}/{rank}" for rank in range(size)]
        store.set(keys[self.rank], json.dumps(mine))
        try:
            store.wait(keys, patience)
            outcome: list[int] = []
        except dist.DistStoreError:
            outcome = [rank for rank in range(size) if not store.check([keys[rank]])]
        verdict_key = f"distpatch/{call}/verdict"
        verdict = store.compare_set(verdict_key, "", json.dumps(outcome))
        missing: list[int] = json.loads(verdict)
        if missing:
            return [], missing
        answers = [json.loads(answer) for answer in store.multi_get(keys)]
        if call > 1:  # everyone has passed the call before
            store.delete_key(f"distpatch/{call - 1}/{self.rank}")
            if self.rank == 0:
                store.delete_key(f"distpatch/{call - 1}/verdict")
        return answers, []

    def new_name(self, label: str) -> str:
        """A name that all who met last have alike, and that no other meeting gives."""
        number = self.call if self.size > 1 else self.store.add("distpatch/alone", 1)
        return f"distpatch {label} {number}"

    def leave_note(self, note: str) -> None:
        """Say that this rank gives up the call, and why; the first note counts."""
        self.store.compare_set(self._note_key(self.rank), "", note)

    def abort_note(self, rank: int) -> str:
        """The note that another rank left when it gave up this call, or nothing."""
        key = self._note_key(rank)
        try:
            note = self.store.get(key).decode() if self.store.check([key]) else ""
        except (RuntimeError, dist.DistError):
            return "; the rendezvous store does not answer either"
        return f"; rank {rank} {note}" if note else ""

    def ranks_without_note(self) -> list[int]:
        """The ranks that leave no note in this call, within ``GRACE``: dead, or busy with something else."""
        keys = [self._note_key(rank) for rank in range(self.size)]
        try:
            self.store.wait(keys, min(self.timeout, GRACE))
        except dist.DistStoreError:
            return [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        return []

    def _note_key(self, rank: int) -> str:
        return f"distpatch/{self.call}/note/{rank}"


class NoPeers(Rendezvous):
    """Of a rank that is alone, or whose group is simulated: there is nobody to meet, and nobody to tell."""

    has_peers = False

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self.timeout, self.call = rank, size, GRACE, 0

    def require_same_call(
        self, what: str, signature: str | Callable[[], str], payload: Payload | None = None
    ) -> list[Payload]:
        return [payload or {}] * self.size

    def collect(self, mine: Payload, patience: timedelta) -> tuple[list[dict[str, Any]], list[int]]:
        return [mine] * self.size, []

    def leave_note(self, note: str) -> None:
        return None
