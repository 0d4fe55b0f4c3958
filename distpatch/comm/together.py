"""Work of each rank by itself, such as reading a file, whose failure on one rank all of them learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from distpatch.comm.communicator import Communicator
from distpatch.errors import DistPatchError, RankError

T = TypeVar("T")


def together(comm: Communicator, what: str, action: Callable[[], tuple[T, str]], failed: str) -> T:
    """Run this rank's part, then meet the others: what one rank raises is raised on all, as ``DistPatchError``.

    ``action`` returns its result, and what must be the same on all ranks: else a ``RankError``, on all too.
    ``failed``: how the message of a failure begins.
    """
    failure: Exception | None = None
    try:
        done, seen = action()
    except Exception as error:
        failure, seen = error, ""
    note = "" if failure is None else f"{type(failure).__name__}: {failure}"
    answers = comm.rendezvous.require_same_call(what, "", {"failure": note, "seen": seen})
    if notes := [f"rank {rank}: {answer['failure']}" for rank, answer in enumerate(answers) if answer["failure"]]:
        raise DistPatchError(f"{failed}; {'; '.join(notes)}") from failure
    if len({answer["seen"] for answer in answers}) > 1:
        found = "\n".join(f"  rank {rank}: {answer['seen']}" for rank, answer in enumerate(answers))
        raise RankError(f"{what}: the ranks found different things (this is rank {comm.rank}):\n{found}")
    return done
