"""What every group's transfers go through: they are recorded, and a failure names the rank that failed first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler

from distpatch.comm.failures import Failures, Note
from distpatch.comm.transport import Batch, Finish, Layer, Transport, Work, Works
from distpatch.errors import DistPatchError, RankError
from distpatch.profiling.trace import Recorder

T = TypeVar("T")
LATE = ("timeout", "timed out")  # in what gloo, NCCL and the store say
ANY = (None,)  # ranks that may be waited for: it is not known which
LOST = ("connection", "closed", "reset", "broken pipe", "remote process", "nccl", "aborted")


class Watched(Layer):
    """``give_up``: ends the group's transfers on this rank, so that those of the others that wait for it fail.

    ``end_call``: waits until what has landed is known to be whole.
    """

    def __init__(
        self,
        inner: Transport,
        failures: Failures,
        recorder: Recorder,
        give_up: Callable[[], None],
        end_call: Callable[[], None],
    ) -> None:
        super().__init__(inner)
        self.failures, self.recorder = failures, recorder
        self.give_up, self.end_call = give_up, end_call
        self.rank, self.size = failures.rendezvous.rank, failures.rendezvous.size

    def open(self, device: torch.device) -> None:
        self.wait_or_raise("set-up", lambda: self.inner.open(device), ANY)

    def post(self, batch: Batch) -> Works:
        return [(_Named(self, batch.op, work, peer), peer) for work, peer in self._post(batch)]

    def _post(self, batch: Batch) -> Works:
        self.failures.transfers += 1
        return self.wait_or_raise(batch.op, lambda: self.inner.post(batch), ANY)

    @property
    def is_recorded(self) -> bool:
        """Whether anybody asks what is sent: a trace, or torch's profiler."""
        return bool(self.recorder.listening or profiler._is_profiler_enabled)

    def exchange(self, batch: Batch) -> None:
        if not (batch.to or batch.source) or not self.is_recorded:
            return self._begin(batch)()
        with self.recorder.transfer("p2p", batch.op, batch.sent_bytes, len(batch.to), batch.device):
            self._begin(batch)()

    def begin(self, batch: Batch) -> Finish:
        if not (batch.to or batch.source) or not self.is_recorded:
            return self._begin(batch)
        with self.recorder.transfer("p2p", batch.op, batch.sent_bytes, len(batch.to), batch.device) as record:
            finish = self._begin(batch)
        started = time.perf_counter()

        def finish_and_record() -> None:
            with self.recorder.wait(record, started, batch.device):
                finish()

        return finish_and_record

    def _begin(self, batch: Batch) -> Finish:
        return partial(self._wait_for, batch.op, self._post(batch))

    def _wait_for(self, op: str, works: Works) -> None:
        """All of them, one after the other; a failure names the rank that was waited for then."""
        if works:
            at = [works[0][1]]
            self.wait_or_raise(op, lambda: _wait_in_turn(works, at), at)

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        self.failures.transfers += 1
        if not self.is_recorded:
            return self.wait_or_raise(op, lambda: self.inner.all_reduce(tensor, op), ANY)
        sent = ring_traffic("all_reduce", tensor.nbytes, self.size)
        with self.recorder.transfer("all_reduce", op, *sent, tensor.device):
            self.wait_or_raise(op, lambda: self.inner.all_reduce(tensor, op), ANY)

    def all_gather(self, tensor: Tensor, op: str) -> Tensor:
        self.failures.transfers += 1
        if not self.is_recorded:
            return self.wait_or_raise(op, lambda: self.inner.all_gather(tensor, op), ANY)
        sent = ring_traffic("all_gather", tensor.nbytes, self.size)
        with self.recorder.transfer("all_gather", op, *sent, tensor.device):
            return self.wait_or_raise(op, lambda: self.inner.all_gather(tensor, op), ANY)

    def wait_or_raise(self, op: str, wait: Callable[[], T], at: Sequence[int | None]) -> T:
        """Run waits of a transfer; a failure becomes a ``RankError`` that names the rank waited for, ``at[-1]``."""
        failures, lands_later = self.failures, self.lands_later
        before = failures.waiting_since
        if before is None or not lands_later:
            failures.waiting_since = time.monotonic()
        try:
            result = wait()
        except DistPatchError:
            raise
        except Exception as error:
            raise self._blame(op, error, at[-1]) from error
        finally:
            if not lands_later:
                failures.waiting_since = before
        if failures.first is not None:  # on a GPU an aborted wait ends like any other
            raise self._blame(op, RuntimeError("aborted"), at[-1])
        if lands_later and not failures.in_call:
            self.end_call()
        return result

    def _blame(self, op: str, error: Exception, peer: int | None) -> RankError:
        said = str(error).lower()
        late, lost = (any(word in said for word in words) for words in (LATE, LOST))
        ended = "gave up" if self.failures.first is not None else "timed out" if late else "failed"
        waited = f"{ended} waiting for {'another rank' if peer is None else f'rank {peer}'}"
        # A connection is lost because of another rank, which may be about to say why; all else is an error of this one.
        first = self.failures.find() if lost and not late else self.failures.look()
        own = Note(self.rank, f"{waited} in {op} ({type(error).__name__}: {error})")
        if first is None:
            first = self.failures.report(own.rank, own.text)
        self.give_up()
        because = f"; {first}" if first != own else ""  # this rank itself may have been stopped for a while
        return RankError(f"{op}: rank {self.rank} {waited}{because} ({error})")


class UnderWay:
    """A batch of ``op`` that runs behind the computation until somebody needs what it brings.

    ``finish`` may be called any number of times: nothing is read before it has returned.
    """

    def __init__(self, op: str, *finish: Finish) -> None:
        self.op = op
        self._left = finish  # to be done, in this order
        self._is_lost = False
        self._in_inference = torch.is_inference_mode_enabled()

    def finish(self) -> None:
        """Wait until all has landed; ``RankError`` where it never will."""
        if not self._left:
            return
        if self._is_lost:
            raise RankError(f"{self.op}: rows of other ranks never came, as the group's transfers have failed")
        self._is_lost = True  # if the wait fails, nobody knows what has landed
        if self._in_inference:  # rows that were asked for in it can be written to nowhere else
            with torch.inference_mode():
                self._run()
        else:
            self._run()
        self._left, self._is_lost = (), False

    def _run(self) -> None:
        for step in self._left:
            step()

    def give_up(self) -> None:
        """What has not been waited for will not land."""
        self._is_lost = True


@dataclass(frozen=True)
class _Named:
    """A ``Work`` whose failure names the rank that it waits for."""

    watched: Watched
    op: str
    work: Work
    peer: int | None

    def wait(self) -> None:
        self.watched.wait_or_raise(self.op, self.work.wait, [self.peer])


def _wait_in_turn(works: Works, at: list[int | None]) -> None:
    """``at``: the rank that is waited for."""
    for work, at[0] in works:
        work.wait()


def ring_traffic(kind: str, size_bytes: int, ranks: int) -> tuple[int, int]:
    """Bytes and messages of a rank in a ring: each passes on what it has to its neighbour, ranks - 1 times."""
    passes = (2 if kind == "all_reduce" else 1) * (ranks - 1)
    return passes * size_bytes // (ranks if kind == "all_reduce" else 1), passes
