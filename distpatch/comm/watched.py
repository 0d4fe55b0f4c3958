"""What every group's transfers go through: they are recorded, and a failure names the rank that was waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distpatch.comm.rendezvous import Rendezvous
from distpatch.comm.transport import Batch, Layer, Transport, Works, wait
from distpatch.errors import DistPatchError, RankError
from distpatch.profiling.trace import Recorder

T = TypeVar("T")


class Watched(Layer):
    """``abort``: gives up the group's transfers, and tells the other ranks why."""

    def __init__(
        self, inner: Transport, rendezvous: Rendezvous, recorder: Recorder, abort: Callable[[str], None]
    ) -> None:
        super().__init__(inner)
        self.rendezvous, self.recorder, self.abort = rendezvous, recorder, abort

    def open(self, device: torch.device) -> None:
        self.wait_or_raise("set-up", lambda: self.inner.open(device), None)

    def post(self, batch: Batch) -> Works:
        works = self.wait_or_raise(batch.op, lambda: self.inner.post(batch), None)
        return [(_Named(self, batch.op, work.wait, peer), peer) for work, peer in works]

    def exchange(self, batch: Batch) -> None:
        if batch.empty:  # no message of this rank's: nothing to record
            return wait(self.post(batch))
        with self.recorder.transfer("p2p", batch.op, batch.sent_bytes, len(batch.to), batch.device):
            wait(self.post(batch))

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        sent = ring_traffic("all_reduce", tensor.nbytes, self.rendezvous.size)
        with self.recorder.transfer("all_reduce", op, *sent, tensor.device):
            self.wait_or_raise(op, lambda: self.inner.all_reduce(tensor, op), None)

    def all_gather(self, tensor: Tensor, op: str) -> Tensor:
        sent = ring_traffic("all_gather", tensor.nbytes, self.rendezvous.size)
        with self.recorder.transfer("all_gather", op, *sent, tensor.device):
            return self.wait_or_raise(op, lambda: self.inner.all_gather(tensor, op), None)

    def wait_or_raise(self, op: str, wait: Callable[[], T], peer: int | None) -> T:
        """Run one wait of a transfer; a failure becomes a ``RankError`` that names the rank waited for."""
        try:
            return wait()
        except DistPatchError:
            raise
        except Exception as error:
            raise self._blame(op, error, peer) from error

    def _blame(self, op: str, error: Exception, peer: int | None) -> RankError:
        meeting = self.rendezvous
        blamed = f"rank {peer}" if peer is not None else "another rank"
        said = "" if peer is not None else f" ({type(error).__name__}: {error})"  # it may be this rank's own fault
        late = any(word in str(error).lower() for word in ("timeout", "timed out"))
        waited = "timed out waiting for" if late else "failed waiting for"
        self.abort(f"{waited} {blamed}{said}")
        others = [rank for rank in range(meeting.size) if rank != meeting.rank] if peer is None else [peer]
        try:
            missing = meeting.ranks_without_note() if peer is None else []  # a collective does not say who is missing
            if missing:
                blamed = f"another rank of the group (no word from {', '.join(f'rank {r}' for r in missing)})"
        except (RuntimeError, dist.DistError):
            pass  # abort_note() says that the store is gone
        reasons = "".join(meeting.abort_note(rank) for rank in others)
        return RankError(f"{op}: rank {meeting.rank} {waited} {blamed}{reasons} ({error})")


@dataclass(frozen=True)
class _Named:
    """A ``Work`` whose failure names the rank that it waits for."""

    watched: Watched
    op: str
    ended: Callable[[], object]
    peer: int | None

    def wait(self) -> None:
        self.watched.wait_or_raise(self.op, self.ended, self.peer)


def ring_traffic(kind: str, size_bytes: int, ranks: int) -> tuple[int, int]:
    """Bytes and messages of a rank in a ring: each passes on what it has to its neighbour, ranks - 1 times."""
    passes = (2 if kind == "all_reduce" else 1) * (ranks - 1)
    return passes * size_bytes // (ranks if kind == "all_reduce" else 1), passes
