"""A thread that looks after one that waits: for a message that will not come, a wait has no end of its own.

It does nothing but look at a flag until a wait has lasted for a while. Then it asks whether another rank has left a
note that it failed, and whether the processes of all ranks run, and ends the wait of its own rank if not. How long a
rank computes is never asked.
"""

from __future__ import annotations

import multiprocessing.util
import threading
import time
import weakref
from collections.abc import Callable

from distpatch.comm.failures import Failures

TICK_S = 0.25
AT_EXIT_S = 10.0  # for all threads to end, on a busy host
_running: weakref.WeakSet[Watch] = weakref.WeakSet()


class Watch:
    """Of one connection of a group. ``abort``: ends all waits of this rank for the others."""

    def __init__(self, failures: Failures, abort: Callable[[], None]) -> None:
        self.failures, self._abort = failures, abort
        self.ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Needed for the first wait; ends with ``stop``, or with whatever holds the watch."""
        self._thread = threading.Thread(target=_run, args=(weakref.ref(self), self.failures, self.ended), daemon=True)
        self._thread.name = "distpatch watch"
        weakref.finalize(self, self.ended.set)
        if not _running:  # as atexit, which processes that multiprocessing forks do not have
            multiprocessing.util.Finalize(None, _stop_all, exitpriority=0)
        _running.add(self)
        self._thread.start()

    def stop(self, patience_s: float = TICK_S) -> None:
        self.ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(patience_s)

    def tick(self) -> None:
        """One look."""
        self.failures.give_sign()
        failures, since, meeting = self.failures, self.failures.waiting_since, self.failures.rendezvous.waiting
        if meeting is not None and time.monotonic() - meeting[1] > TICK_S:
            if gone := failures.gone():
                failures.rendezvous.refuse(meeting[0], failures.store, gone)
        elif since is not None and time.monotonic() - since > TICK_S:
            if failures.look() is not None:
                self._abort()
        elif meeting is None and since is None:
            failures.processes.listen_anew()


def _run(watch: weakref.ref[Watch], failures: Failures, ended: threading.Event) -> None:
    while not ended.wait(TICK_S):
        this = watch()
        if this is None:
            break
        this.tick()
        del this
    failures.leave()


def _stop_all() -> None:
    """At the end of the process: a thread that comes back from the store when Python has gone would abort it."""
    watches, last = list(_running), time.monotonic() + AT_EXIT_S
    for watch in watches:
        watch.ended.set()
    for watch in watches:
        watch.stop(max(last - time.monotonic(), 0))
