"""The ranks that share a tensor: their own process group, its warm-up, and the handshake."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from distpatch.errors import LayoutError, RankError
from distpatch.trace import Recorder

Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | Pretended | None"
Parts: TypeAlias = "list[tuple[int, list[Tensor]]]"  # by peer: the pieces of one message, in order

GRACE = timedelta(seconds=2)  # between the first and the last rank that notices a failed collective


class Policy(Protocol):
    """What becomes of a rule's transfers, where they are not to be waited for (displaced.py).

    ``key``: what all ranks know of the transfer, to tell one call site from another.
    """

    def exchange(self, op: str, key: tuple[Any, ...], sends: Parts, recvs: Parts, device: torch.device) -> None:
        """Fill the parts of ``recvs``, by peer, from what the ranks send with this call or sent before."""

    def moments(self, op: str, counts: Sequence[int], mean: Tensor, m2: Tensor) -> tuple[int, Tensor, Tensor]:
        """Count, mean and centred second moment of all ranks' samples; ``counts``: how many each rank has."""


class Communicator:
    """One rank's end of a group.

    Transfers run on a duplicate of the user's group: point-to-point messages that share a
    communicator with the user's own collectives can be matched with the wrong ones. The handshake
    runs on the group's key-value store, so that it can time out without harming either group.
    ``Communicator(None)`` is a group of this rank alone. Both groups are referred to weakly: torch keeps
    them while they are open, and a closed one must be freed.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group: Callable[[], dist.ProcessGroup | None] = _nothing
        self._pg: Callable[[], dist.ProcessGroup | None] = _nothing
        self.recorder = Recorder()
        self.rank, self.size, self.name = 0, 1, ""
        self.broken = False
        self.by_collectives = False  # rows move by all_gather: point to point is broken here (self_test)
        self.call = 0
        self.policy: Policy | None = None  # of the step that runs now, where it is a displaced one
        self.lane: Communicator | None = None  # another duplicate, for what runs behind the computation
        self.serves = ""  # of a lane: the name of whose it is
        self.timeout = GRACE  # nobody is waited for in a group of one
        if group is None:
            return
        self._group = weakref.ref(group)
        self.rank, self.size = group.rank(), group.size()
        self.store = group.get_group_store()
        self.timeout = _timeout(group)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The user's group, or None where there is none or it is closed."""
        return self._group()

    @property
    def pg(self) -> dist.ProcessGroup | None:
        """The duplicate that transfers run on."""
        return self._pg()

    def connect(self) -> None:
        """Create the group's duplicate and open its channels; every rank of the group calls it.

        One collective goes first: communicators are made lazily, and a first point-to-point batch
        that not all ranks join hangs or fails under CUDA-graph capture.
        """
        group = self.group
        if group is None or (self.pg is not None and not self.broken):
            return
        members = dist.get_process_group_ranks(group)
        known = len(c10d._world.pg_names)
        counts = self.agree("set-up", "", {"groups": known})
        # torch names a locally synchronised group by its ranks and by how many groups this process
        # knows. Ranks that know different numbers would wait for each other under different names.
        for _ in range(max(int(str(peer["groups"])) for peer in counts) - known):
            dist.new_group([dist.get_rank()], use_local_synchronization=True)
        pg = dist.new_group(
            members,
            timeout=self.timeout,
            backend=dist.get_backend_config(group),
            use_local_synchronization=True,
            group_desc="distpatch",
            sort_ranks=False,
        )
        self._pg = weakref.ref(pg)
        self.name = f"{pg.group_name} {self.rank}/{self.size}"
        self.broken = False
        _by_pg[pg] = self
        self.warmup()

    def warmup(self) -> None:
        """One small collective on every backend of the group (gloo's channels are those of the CPU)."""
        pg = self.pg
        if pg is None:
            return
        for device in pg._device_types:
            if device.type != "cpu" and pg._get_backend(device).name() == "gloo":
                continue
            dist.all_reduce(torch.zeros(1, device=device), group=pg)

    def agree(self, what: str, signature: str, payload: dict[str, object] | None = None) -> list[dict[str, object]]:
        """Meet all ranks of the group, which must all come with the same signature.

        Returns every rank's payload. Raises ``RankError`` on every rank if one is missing for longer
        than the group's timeout or came with something else. The first rank that knows the outcome
        writes the verdict, and all follow it: a rank that arrives as the others give up cannot go on
        alone.
        """
        answers, missing = self.meet({"what": what, "signature": signature, **(payload or {})}, self.timeout)
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

    def meet(self, mine: dict[str, object], patience: timedelta) -> tuple[list[dict[str, Any]], list[int]]:
        """What every rank brought to this meeting, and the ranks that did not come within ``patience``.

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

    @property
    def closed(self) -> bool:
        """Whether the group, or its duplicate, was destroyed."""
        return not all(pg is not None and pg in c10d._world.pg_map for pg in (self.group, self.pg))

    def enter(self, what: str, signature: str, payload: dict[str, object] | None = None) -> list[dict[str, object]]:
        """Meet all ranks before a sharded computation; mend the transfers if the last one failed.

        Returns every rank's payload, with ``"broken"`` added.
        """
        if not self.name:
            return [{"broken": False, **(payload or {})}]
        if self.closed:
            raise RankError(f"{what}: the process group is closed (this is rank {self.rank})")
        answers = self.agree(what, signature, {"broken": self.broken, **(payload or {})})
        if any(answer["broken"] for answer in answers):
            self.broken = True
            self.connect()
        return answers

    def leave_broken(self, note: str) -> None:
        """Say that this rank gives up the call, and why, for the others to read; the first note counts."""
        self.broken = True
        if self.name and not self.closed:
            self.store.compare_set(self._note_key(self.rank), "", note)

    def why(self, rank: int) -> str:
        """The note that another rank left when it gave up this call, or nothing."""
        key = self._note_key(rank)
        try:
            note = self.store.get(key).decode() if self.store.check([key]) else ""
        except (RuntimeError, dist.DistError):
            return "; the rendezvous store does not answer either"
        return f"; rank {rank} {note}" if note else ""

    def silent(self) -> list[int]:
        """The ranks that leave no note in this call, within ``GRACE``: dead, or busy with something else."""
        keys = [self._note_key(rank) for rank in range(self.size)]
        try:
            self.store.wait(keys, min(self.timeout, GRACE))
        except dist.DistStoreError:
            return [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        return []

    def _note_key(self, rank: int) -> str:
        return f"distpatch/{self.call}/note/{rank}"


class Pretended(Communicator):
    """One rank of a group that does not exist, for fake tensors: of transfers only the shapes are known.

    ``rank`` and ``size`` of the group. Passed to ``convert_model`` in place of a group, under a
    ``FakeTensorMode``.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(None)
        self.rank, self.size, self.name = rank, size, f"rank {rank} of {size}, pretended, {id(self)}"
        _pretended[self.name] = self

    def agree(self, what: str, signature: str, payload: dict[str, object] | None = None) -> list[dict[str, object]]:
        return [payload or {}] * self.size

    def enter(self, what: str, signature: str, payload: dict[str, object] | None = None) -> list[dict[str, object]]:
        """There is nobody to meet."""
        return [{"broken": False, **(payload or {})}]

    def leave_broken(self, note: str) -> None:
        """There is nobody to tell."""


def _nothing() -> None:
    return None


# Weak keys: a communicator is known as long as the group is open, and each thread-rank has groups of its own.
_by_group: weakref.WeakKeyDictionary[dist.ProcessGroup, Communicator] = weakref.WeakKeyDictionary()
_by_pg: weakref.WeakKeyDictionary[dist.ProcessGroup, Communicator] = weakref.WeakKeyDictionary()
_pretended: weakref.WeakValueDictionary[str, Pretended] = weakref.WeakValueDictionary()
ALONE = Communicator(None)


def communicator(group: Group, *, connect: bool = True) -> Communicator:
    """The communicator of a user's group, connected; every rank of the group calls it the first time.

    ``connect=False`` leaves it as it is, perhaps without channels yet.

    Raises ``RankError`` where this rank is not a member or the group is closed, ``LayoutError`` for a
    mesh of more than one dimension.
    """
    if group is None:
        return ALONE
    if isinstance(group, Pretended):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise LayoutError(
                f"rows are sharded over one mesh axis; got a {group.ndim}-D mesh {group}. "
                'Pass one axis of it, for example mesh["rows"].'
            )
        if group.get_coordinate() is None:
            raise RankError(f"global rank {dist.get_rank()} is not a member of the mesh {group}")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise RankError(
            f"this rank is not a member of the group ({group!r} is what torch gives to non-members); "
            "only members convert and call the model"
        )
    if not dist.is_initialized() or group not in c10d._world.pg_map:
        raise RankError("the process group is closed (or was never initialised in this process)")
    known = _by_group.get(group)
    if known is None:
        known = _by_group[group] = Communicator(group)
    if connect:
        known.connect()
    return known


def communicator_of(name: str) -> Communicator:
    """The communicator of this name, as custom ops carry it: its own group's, and this rank's place in it.

    A compiled graph is cached by its operators' arguments, and made for one rank alone.
    """
    if not name:
        return ALONE
    group_name = c10d.GroupName(name.rpartition(" ")[0])
    return _pretended.get(name) or _by_pg[torch._C._distributed_c10d._resolve_process_group(group_name)]


def warmup(group: Group) -> None:
    """Open the channels of a group before the first use, so that it costs nothing then."""
    communicator(group).warmup()


def attempt(comm: Communicator, what: str, wait: Callable[[], object], peer: int | None) -> None:
    """Run one wait of a transfer; a failure becomes a ``RankError`` that names the rank waited for."""
    try:
        wait()
    except RuntimeError as error:
        blamed = f"rank {peer}" if peer is not None else "another rank"
        comm.leave_broken(f"waited for {blamed} in vain")
        others = [rank for rank in range(comm.size) if rank != comm.rank] if peer is None else [peer]
        try:
            if peer is None and (silent := comm.silent()):  # a collective does not say who is missing
                blamed = f"another rank of the group (no word from {', '.join(f'rank {r}' for r in silent)})"
        except (RuntimeError, dist.DistError):
            pass  # why() says that the store is gone
        reasons = "".join(comm.why(rank) for rank in others)
        raise RankError(f"{what}: rank {comm.rank} waited for {blamed} in vain{reasons} ({error})") from error


def _timeout(group: dist.ProcessGroup) -> timedelta:
    backend = group._get_backend(torch.device(group._device_types[0]))
    timeout: timedelta = backend.options._timeout
    return timeout
