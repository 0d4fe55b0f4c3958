"""A duplicate of a user's group, which transfers run on until they fail: its channels, and who watches them."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from distpatch.comm import devices, process_groups
from distpatch.comm.choose_transport import factory
from distpatch.comm.failures import Failures
from distpatch.comm.processes import Process, Processes
from distpatch.comm.rendezvous import Rendezvous
from distpatch.comm.transport import Transport
from distpatch.comm.watch import Watch
from distpatch.comm.watched import Watched
from distpatch.errors import RankError
from distpatch.profiling.trace import Recorder

POLL_S = 50e-6


class Connection:
    """One rank's end of it; every rank makes it, and opens its channels for a device, at the same time.

    ``name``: as custom operators carry it; ``broken``: transfers have failed, and what their messages did, nobody
    knows. ``processes``: those of all ranks.
    """

    def __init__(
        self,
        name: str,
        pg: dist.ProcessGroup,
        device: torch.device,
        processes: Sequence[Process],
        rendezvous: Rendezvous,
        recorder: Recorder,
    ) -> None:
        self.name = name
        self.device, self.rendezvous, self.recorder = device, rendezvous, recorder
        self.broken = False
        self._pg: Callable[[], dist.ProcessGroup | None] = weakref.ref(pg)
        self._made: dict[torch.device, Watched] = {}
        self._landing: list[Iterator[None]] = []  # of calls that are not known to be whole
        self._late = False
        self._opened = {device}
        self.failures = Failures(rendezvous, Processes(processes, rendezvous.rank), pg.group_name)
        this = weakref.ref(self)
        self.watch = Watch(self.failures, lambda: _give_up(this))
        self.watch.start()

    @property
    def pg(self) -> dist.ProcessGroup | None:
        return self._pg()

    def forget(self) -> None:
        """Make transports anew, by another factory."""
        self._made.clear()

    def open(self) -> None:
        """Open the channels for tensors of the device that it was made on."""
        _open(self.transport(self.device), self.device)

    def transport(self, device: torch.device) -> Transport:
        """How tensors of this device travel. The first time every rank of the group calls it: it opens the channels."""
        if device in self._made:
            return self._made[device]
        rank = self.rendezvous.rank
        if self.pg is None:
            raise RankError(f"the process group is closed (this is rank {rank})")
        inner = factory()(self.pg, device)
        made = Watched(inner, self.failures, self.recorder, self.give_up, self.end_call)
        if device not in self._opened:
            if device.type != "cpu":
                identity = devices.identity(self.pg, device)
                devices.check(self.rendezvous.require_same_call("set-up of a device", "", identity), rank)
            self._opened.add(device)
            _open(made, device)
        self._made[device] = made
        return made

    def end_call(self, *, wait: bool = True) -> None:
        """Raise ``RankError`` where what has landed since the last call may not be whole.

        ``wait``: until that is known; else ``ended_unchecked`` may tell it later.
        """
        if self.failures.waiting_since is not None:
            self._landing += [transport.finish() for transport in self._made.values()]
            self._late = not wait
            self._look(wait)
        if (first := self.failures.first) is not None and wait:
            raise RankError(f"rank {self.rendezvous.rank} gave up the call, as another one has failed; {first}")

    def ended_unchecked(self) -> bool:
        """Whether the last call has ended before it was known to be whole; where one has failed, whether it is not."""
        if self._late:
            self._look(wait=False)
        return self._late and (self.failures.first is None or bool(self._landing))

    def _look(self, wait: bool) -> None:
        while self.failures.first is None:
            self._landing = [landing for landing in self._landing if next(landing, self) is not self]
            if not self._landing:
                self.failures.waiting_since = None
                return
            if not wait:
                return
            time.sleep(POLL_S)

    def give_up(self) -> None:
        """Send nothing more, and let the others' waits for this rank fail."""
        if self.broken:
            return
        self.broken = True
        for transport in self._made.values():
            transport.abort()
        if (pg := self.pg) is not None and not self._made:
            process_groups.abort(pg)

    def close(self) -> None:
        """Free what a connection has that another one has taken the place of."""
        self.watch.stop()
        if (pg := self.pg) is not None:
            process_groups.close(pg)


def _give_up(connection: weakref.ref[Connection]) -> None:
    if (this := connection()) is not None:
        this.give_up()


def _open(transport: Transport, device: torch.device) -> None:
    """One collective goes first: communicators are made lazily.

    A first point-to-point batch that not all ranks join hangs, or fails under CUDA-graph capture.
    """
    with devices.current(device):
        transport.open(device)
