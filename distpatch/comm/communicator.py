"""The ranks that share a tensor: their own process group, and how their tensors travel."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, TypeAlias
from zlib import crc32

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore

from distpatch.comm import devices, process_groups, processes
from distpatch.comm.choose_transport import tell
from distpatch.comm.connection import Connection
from distpatch.comm.failures import Note
from distpatch.comm.rendezvous import NoPeers, Payload, Rendezvous
from distpatch.comm.transport import AddLayer, Batch, Finish, Transport
from distpatch.comm.watched import UnderWay
from distpatch.errors import LayoutError, RankError
from distpatch.profiling.trace import Recorder
from distpatch.torch_utils import private

LIVENESS_S = 3.0  # by default

Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | Communicator | None"


def _nothing() -> None:
    return None


class Communicator:
    """One rank's end of a group.

    Transfers run on a duplicate of the user's group: point-to-point messages that share a
    communicator with the user's own collectives can be matched with the wrong ones. The handshake
    runs on the group's key-value store (``rendezvous``). ``Communicator(None)`` is a group of this rank alone. Both
    groups are referred to weakly: torch keeps them while they are open, and a closed one must be freed.
    """

    def __init__(self, group: dist.ProcessGroup | None, rendezvous: Rendezvous | None = None) -> None:
        if rendezvous is None:
            rendezvous = NoPeers() if group is None else process_groups.rendezvous_of(group)
        self.rendezvous, self.rank, self.size = rendezvous, rendezvous.rank, rendezvous.size
        self.recorder = Recorder()
        self._group: Callable[[], dist.ProcessGroup | None] = _nothing if group is None else weakref.ref(group)
        self._connection: Connection | None = None
        self._liveness: float | None = LIVENESS_S
        self.late_check = False
        self.parts = 0  # a checksum of which parts were sent that are sharded over an inner axis (``sends_parts``)
        self._layers: tuple[AddLayer, ...] = ()
        self._transports: dict[torch.device, Transport] = {}  # with the layers on top
        self._under_way: UnderWay | None = None  # what was begun last
        self.thread = 0  # that has sent something last
        tell(self)
        self._duplicates: weakref.WeakSet[Communicator] = weakref.WeakSet()  # of the same ranks, this one among them
        self._duplicates.add(self)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The user's group, or None where there is none or it is closed."""
        return self._group()

    @property
    def pg(self) -> dist.ProcessGroup | None:
        """The duplicate that transfers run on."""
        return None if self._connection is None else self._connection.pg

    @property
    def name(self) -> str:
        """As custom operators carry it (``communicator_of``); of every connection another one. Empty: none so far."""
        return "" if self._connection is None else self._connection.name

    @property
    def device(self) -> torch.device | None:
        """The device that the connection was made on."""
        return None if self._connection is None else self._connection.device

    @property
    def broken(self) -> bool:
        """Whether the last transfers failed: what their messages did, nobody knows."""
        return self._connection is not None and self._connection.broken

    @property
    def liveness(self) -> float | None:
        """Seconds that a rank's process may be stopped before it counts as gone (``Failures.patience``)."""
        return self._liveness

    @liveness.setter
    def liveness(self, seconds: float | None) -> None:
        self._liveness = seconds
        if self._connection is not None:
            self._connection.failures.patience = seconds

    @property
    def closed(self) -> bool:
        """Whether the group, or its duplicate, was destroyed."""
        if self._group is _nothing:
            return False
        return not all(pg is not None and private.is_open(pg) for pg in (self.group, self.pg))

    @property
    def has_peers(self) -> bool:
        """Whether other ranks exist, to be told something or sent values to."""
        return self.size > 1 and self.rendezvous.has_peers

    def duplicate(self) -> Communicator:
        """Another communicator of the same ranks, whose transfers never stand in front of this one's.

        Every rank of the group calls it.
        """
        other = Communicator(self.group, self.rendezvous)
        other.connect(self.device)
        self._duplicates.add(other)
        other._duplicates = self._duplicates
        return other

    def of_mesh(self, others: Sequence[Communicator]) -> Communicator:
        """That of all ranks of a mesh, whose first axis is this one; every rank of the mesh calls it."""
        ranks = _ranks_of(others[-1] if others else self)
        for comm in reversed([self, *others][:-1]):
            answers: list[Any] = comm.rendezvous.require_same_call("the axes of a mesh", "", {"ranks": ranks})
            ranks = [int(rank) for answer in answers for rank in answer["ranks"]]
        if len(set(ranks)) < len(ranks):
            raise LayoutError(f"the groups of the axes are no mesh: together they have the ranks {ranks}")
        return communicator(group_of(ranks) if len(ranks) > 1 else None, self.device)

    def connect(self, given: torch.device | None = None) -> None:
        """Create the group's duplicate and open its channels; every rank of the group calls it.

        ``given``: where the tensors are that will move, if that is known. Raises ``RankError`` where the ranks'
        devices cannot be connected, such as one GPU for two of them.
        """
        group, last = self.group, self._connection
        if group is None or (self.pg is not None and not self.broken):
            return
        device = devices.choose(group, given or self.device)
        meeting = self.rendezvous
        mine = {**devices.identity(group, device), "process": processes.identity()}
        answers: list[Any] = meeting.require_same_call("set-up", "", mine)
        devices.check(answers, self.rank)
        if last is not None:
            last.close()
        with devices.current(device):
            pg = process_groups.by_members(
                dist.get_process_group_ranks(group),
                meeting.new_name(group.group_name),
                backend=str(dist.get_backend_config(group)),
                timeout=meeting.timeout,
            )
        ranks = [processes.Process(**answer["process"]) for answer in answers]
        name = f"{pg.group_name} {self.rank}/{self.size}"
        while name in _known:  # a group of the same name: closed by now, or of another thread
            name += "'"
        self._transports.clear()
        self._connection = connection = Connection(name, pg, device, ranks, meeting, self.recorder)
        connection.failures.patience = self._liveness
        remember(self)
        self.warmup()

    def warmup(self) -> None:
        """Open the channels for tensors of the communicator's device; every rank of the group calls it."""
        if self._connection is not None:
            self._connection.open()

    def transport(self, device: torch.device) -> Transport:
        """How tensors of this device travel. The first time every rank of the group calls it: it opens the channels.

        What was begun before is waited for. Raises ``RankError`` where the last transfers of the group failed.
        """
        if self._under_way is not None:
            self.finish()
        self.thread = get_ident()
        connection, transport = self._connection, self._transports.get(device)
        if transport is not None and connection is not None and not connection.broken:
            return transport
        if connection is None:
            raise RankError(f"the group has no connection: it was closed, or never used (this is rank {self.rank})")
        if connection.broken:
            first = connection.failures.first
            raise RankError(
                f"the transfers of this group have failed and were given up (this is rank {self.rank}"
                f"{'' if first is None else f'; {first}'}). The next call of a converted model begins anew, on all "
                "ranks."
            )
        transport = connection.transport(device)
        for add in self._layers:
            transport = add(transport)
        self._transports[device] = transport
        return transport

    def begin(self, batch: Batch, *unpack: Finish) -> UnderWay:
        """Messages behind what is computed; they end at the latest where the group's next transfer or its call does.

        ``unpack``: what is done with them then.
        """
        begun = UnderWay(batch.op, self.transport(batch.device).begin(batch), *unpack)
        self._under_way = begun
        return begun

    def finish(self) -> None:
        """Wait for what was begun."""
        if self._under_way is not None:
            begun, self._under_way = self._under_way, None
            begun.finish()

    def forget_transports(self) -> None:
        """Make them anew, where another factory has come to count."""
        self._transports.clear()
        if self._connection is not None:
            self._connection.forget()

    def use(self, *layers: AddLayer) -> None:
        """From now on this group's transfers go through these layers, the last one first; every rank calls it."""
        self._layers = layers
        self._transports.clear()

    @contextmanager
    def using(self, layer: AddLayer) -> Iterator[None]:
        """While it is open, this group's transfers go through this layer first."""
        before = self._layers
        self.use(*before, layer)
        try:
            yield
        finally:
            self.use(*before)

    def begin_call(
        self, what: str, signature: str | Callable[[], str], payload: Payload | None = None
    ) -> list[Payload]:
        """Meet all ranks before a sharded computation; mend the transfers if the last one failed.

        Returns every rank's payload, with ``"broken"`` and ``"unchecked"`` added. Raises ``RankError`` on every rank
        where they come differently, one does not come, or the call before ended unchecked and has failed.
        """
        if self.closed and self.name:
            raise RankError(f"{what}: the process group is closed (this is rank {self.rank})")
        last = self._connection
        unchecked = any(connection.ended_unchecked() for connection in self._connections())
        mine = {"broken": self.broken, "unchecked": unchecked, **(payload or {})}
        answers = self.rendezvous.require_same_call(what, signature, mine)
        if any(answer["broken"] for answer in answers):
            self.give_up()
            self.connect()
            if last is not None and any(answer["unchecked"] for answer in answers):
                raise RankError(
                    f"{what}: the call before it, whose end was not waited for (late_check=True), has failed: what it "
                    f"returned is not whole (this is rank {self.rank}; {last.failures.look()})"
                )
        return answers

    def end_call(self) -> None:
        """What has landed in this call is whole, or ``RankError``: on a GPU it waits until that is known.

        ``late_check``: the next call will tell.
        """
        self.finish()
        self.in_call = False
        for connection in self._connections():
            connection.end_call(wait=not self.late_check)

    @contextmanager
    def open_call(self, what: str) -> Iterator[None]:
        """An exception of this rank ends the others' waits, and is told to them; without one, ``end_call`` follows."""
        self.in_call = True
        try:
            yield
            self.end_call()
        except BaseException as error:
            self.abort_call(f"raised {type(error).__name__}: {error} (in {what})")
            raise

    @property
    def failure(self) -> Note | None:
        """What is known of a failure that was noticed just now: of the rank that failed first, if it or others say."""
        return None if self._connection is None else self._connection.failures.find()

    @property
    def in_call(self) -> bool:
        """Whether ``end_call`` will follow."""
        return self._connection is not None and self._connection.failures.in_call

    @in_call.setter
    def in_call(self, whether: bool) -> None:
        for connection in self._connections():
            connection.failures.in_call = whether

    def _connections(self) -> list[Connection]:
        """Of this communicator and its duplicates."""
        return [other._connection for other in self._duplicates if other._connection is not None]

    def give_up(self) -> None:
        """Send nothing more until all ranks have connected anew; what the others wait for from this rank fails."""
        if self._under_way is not None:
            self._under_way.give_up()
            self._under_way = None
        for connection in self._connections():
            connection.give_up()

    def abort_call(self, note: str) -> None:
        """Say that this rank gives up the call, and why, for the others to read; the first note of any counts."""
        connection, self.in_call = self._connection, False
        if connection is not None and not connection.broken and not self.closed:
            connection.failures.report(self.rank, note)
            for other in self._connections():
                if other is not connection and not other.broken:
                    other.failures.report(self.rank, note)
        self.give_up()

    def sends_parts(self, op: str, layout: object) -> None:
        """Note how rows are sharded over an inner axis that are sent now: on all ranks of this axis alike."""
        self.parts = crc32(f"{op} {layout}".encode(), self.parts)

    def planned(self, kind: str, op: str, sent_bytes: int, messages: int) -> None:
        """Where tensors are fake, what this rank would send: of a group that exists, a real run records it."""


# Weak keys: a communicator is known as long as the group is open, and each thread-rank has groups of its own.
_by_group: weakref.WeakKeyDictionary[dist.ProcessGroup, Communicator] = weakref.WeakKeyDictionary()
_known: weakref.WeakValueDictionary[str, Communicator] = weakref.WeakValueDictionary()  # by every name it has had
ALONE = Communicator(None)


def communicator(group: Group, device: torch.device | None = None, *, connect: bool = True) -> Communicator:
    """The communicator of a user's group, connected; every rank of the group calls it the first time.

    ``device``: where the tensors are that will move, if that is known. ``connect=False`` leaves it as it is,
    perhaps without channels yet.

    Raises ``RankError`` where this rank is not a member or the group is closed, ``LayoutError`` for a
    mesh of more than one dimension.
    """
    if group is None:
        return ALONE
    if isinstance(group, Communicator):
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
    if not dist.is_initialized() or not private.is_open(group):
        raise RankError("the process group is closed (or was never initialised in this process)")
    known = _by_group.get(group)
    if known is None:
        known = _by_group[group] = Communicator(group)
    if connect:
        known.connect(device)
    return known


def _ranks_of(comm: Communicator) -> list[int]:
    return [0] if comm.group is None else dist.get_process_group_ranks(comm.group)


def group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A new group of these global ranks, of the default group's kind; exactly these ranks call it."""
    world = private.default_group()
    label = "_".join(map(str, ranks))
    store = PrefixStore(f"distpatch/{label}", world.get_group_store())
    meeting = Rendezvous(store, ranks.index(dist.get_rank()), len(ranks), process_groups.timeout_of(world))
    meeting.require_same_call("set-up of a group", str(list(ranks)))
    return process_groups.by_members(ranks, meeting.new_name(f"of {label}"), timeout=meeting.timeout)


def communicator_of(name: str) -> Communicator:
    """The communicator of this name, as custom ops carry it: its own group's, and this rank's place in it.

    A compiled graph is cached by its operators' arguments, and made for one rank alone.
    """
    if not name:
        return ALONE
    known = _known.get(name)
    if known is None:
        raise RankError(f"what is computed here began in a group that is closed ({name!r})")
    return known


def remember(comm: Communicator) -> None:
    """Have ``communicator_of`` find it by its name, as long as somebody holds it."""
    _known[comm.name] = comm


def connected_as(name: str) -> Communicator | None:
    """As ``communicator_of``, None where there is none."""
    return _known.get(name)


def connected() -> list[Communicator]:
    """All communicators of this process that have had a connection."""
    return list(_known.values())


def warmup(group: Group) -> None:
    """Open the channels of a group before the first use, so that it costs nothing then."""
    communicator(group).warmup()
