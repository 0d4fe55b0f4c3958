"""NCCL, as a host sees it, simulated on CPU tensors over gloo: a wait ends when all has landed, or never.

Nothing raises and nothing times out: where a peer is gone, failed or has aborted, a wait spins for ever, and this
rank learns nothing. After ``abort`` waits end at once as if all had landed, and where it should have landed are
random numbers. A thread moves what was posted, one batch or collective after the other as on NCCL's stream: what is
sent is read when the batch is waited for (or a little later than it was posted), what lands is there after the wait.

``pytest --nccl`` runs the suite so, where it would run over gloo.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from distpatch.comm import process_groups
from distpatch.comm.choose_transport import using
from distpatch.comm.point_to_point import as_bytes
from distpatch.comm.transport import Batch, Transport, Works
from tests.support.transports.staged import maybe

FOR_EVER = timedelta(days=1)
LATE_S = 2e-3  # after which a batch is sent that nobody waits for
LOOK_S = 0.01
AHEAD_S = 0.1
TAG = 0

_until_the_end = contextlib.ExitStack()
_garbage = threading.local()  # a generator a thread: the default one is the model's


@dataclass(eq=False)
class Job:
    """One batch or collective on its way. ``move``: run by the thread that moves, on the group."""

    move: Callable[[dist.ProcessGroup, Job], None]
    asked: threading.Event = field(default_factory=threading.Event)  # somebody waits for it
    read: threading.Event = field(default_factory=threading.Event)  # what is sent may be written to
    landed: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)  # what was sent has arrived, too


@dataclass(frozen=True)
class Waited:
    """A ``Work`` of a whole batch, as NCCL gives it."""

    end: SimulatedNCCL
    job: Job
    batch: Batch
    buffers: Sequence[Tensor]

    def wait(self) -> None:
        if self.end.wait(self.job, self.job.landed if self.buffers else self.job.read):
            with torch.inference_mode():
                for place, message in zip(self.batch.landing, self.buffers, strict=True):
                    place.copy_(message)


class SimulatedNCCL(Transport):
    """One rank's end of a group.

    ``runs_ahead``: a wait for what does not come ends soon, as it does for the host; what it computes then is wrong.
    The host waits in ``synchronize``, as it would for the GPU.
    """

    lands_later = True

    def __init__(self, pg: dist.ProcessGroup, *, runs_ahead: bool = False) -> None:
        self.runs_ahead = runs_ahead
        self._pg = weakref.ref(pg)
        self.size = pg.size()
        self.aborted = threading.Event()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._under_way: list[Job] = []  # that were waited for
        weakref.finalize(self, self._jobs.put, None)
        threading.Thread(target=_move_all, args=(self._jobs, self._pg), name="simulated NCCL", daemon=True).start()

    def post(self, batch: Batch) -> Works:
        if not batch.to and not batch.source:
            return []
        buffers = [torch.empty_like(message) for message in batch.landing]
        for message in batch.landing:
            _spoil(message)
        job = Job(functools.partial(_move_batch, batch, buffers))
        self._jobs.put(job)
        return [(Waited(self, job, batch, buffers), None)]

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        total = _sum(self.all_gather(tensor, op))
        with torch.inference_mode():
            tensor.copy_(total)

    def all_gather(self, tensor: Tensor, op: str) -> Tensor:
        everyone = tensor.detach().new_empty((self.size, *tensor.shape))
        own, landing = as_bytes(tensor.detach().reshape(-1)).clone(), as_bytes(everyone.view(-1))
        job = Job(functools.partial(_gather, own, buffer := torch.empty_like(landing)))
        self._jobs.put(job)
        if self.wait(job, job.landed):
            landing.copy_(buffer)
        else:
            _spoil(everyone)
        return everyone

    def wait(self, job: Job, until: threading.Event) -> bool:
        """Whether it is there: after ``abort`` it is said to be, and nothing is."""
        job.asked.set()
        self._under_way = [other for other in self._under_way if not other.ended.is_set()] + [job]
        asked = time.monotonic()
        while not until.wait(LOOK_S):
            if self.aborted.is_set() or (self.runs_ahead and time.monotonic() - asked > AHEAD_S):
                return False
        return not self.aborted.is_set()

    def synchronize(self) -> None:
        """What ``torch.cuda.synchronize`` does."""
        for _ in self.finish():
            time.sleep(LOOK_S)

    def abort(self) -> None:
        self.aborted.set()
        if (pg := self._pg()) is not None:  # the others' threads fail by this, and say nothing
            process_groups.abort(pg)

    def finish(self) -> Iterator[None]:
        while not self.aborted.is_set() and not all(job.ended.is_set() for job in self._under_way):
            yield


def _move_all(jobs: queue.SimpleQueue[Job | None], group: Callable[[], dist.ProcessGroup | None]) -> None:
    """One after the other; behind one that does not end, none begins."""
    while (job := jobs.get()) is not None:
        pg = group()
        if pg is None:
            return
        try:
            job.move(pg, job)
        except RuntimeError:
            return
        job.ended.set()
        del pg, job


def _move_batch(batch: Batch, buffers: Sequence[Tensor], pg: Any, job: Job) -> None:
    job.asked.wait(LATE_S)
    sent = [as_bytes(message.detach()).clone() for message in batch.outgoing]
    job.read.set()
    receives = [pg.recv([as_bytes(t)], peer, TAG) for peer, t in zip(batch.source, buffers, strict=True) if t.nbytes]
    sends = [pg.send([t], peer, TAG) for peer, t in zip(batch.to, sent, strict=True) if t.nbytes]
    for work in receives:
        work.wait(FOR_EVER)
    job.landed.set()
    for work in sends:
        work.wait(FOR_EVER)


def _gather(own: Tensor, everyone: Tensor, pg: Any, job: Job) -> None:
    options = AllgatherOptions()
    options.timeout = FOR_EVER
    if own.nbytes:
        pg.allgather([list(everyone.view(pg.size(), -1))], [own], options).wait(FOR_EVER)
    job.landed.set()


def _sum(parts: Tensor) -> Tensor:
    """In the order of ranks, on all ranks alike."""
    if parts.dtype == torch.bool:
        return parts.any(0)
    if parts.dtype == torch.uint64:
        return parts.view(torch.int64).sum(0).view(torch.uint64)
    if parts.dtype.is_complex or (parts.dtype.itemsize >= 4 and parts.is_floating_point()):
        return parts.sum(0)
    return parts.to(torch.float32 if parts.is_floating_point() else torch.int64).sum(0).to(parts.dtype)


def _spoil(tensor: Tensor) -> None:
    """Random finite numbers."""
    if not hasattr(_garbage, "generator"):
        _garbage.generator = torch.Generator()
    numbers = torch.rand(tensor.shape, dtype=torch.float64, generator=_garbage.generator)
    with torch.inference_mode():
        tensor.copy_(numbers > 0.5 if tensor.dtype == torch.bool else 100 * numbers)


def simulated(pg: dist.ProcessGroup, device: torch.device) -> Transport:
    """To be used instead of ``choose_transport.between``."""
    return SimulatedNCCL(pg)


def apply() -> None:
    """In this process, until it ends."""
    _until_the_end.enter_context(using(maybe(simulated)))


@contextlib.contextmanager
def simulated_nccl(*, runs_ahead: bool = False) -> Iterator[None]:
    """All groups of this process, in all threads, move their tensors so while the context is open."""
    with using(maybe(lambda pg, device: SimulatedNCCL(pg, runs_ahead=runs_ahead))):
        yield
