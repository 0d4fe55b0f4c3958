"""The ranks that share a tensor: their own process group, and how their tensors travel."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from distpatch.comm import devices, process_groups
from distpatch.comm.all_gather_transport import ByAllGather
from distpatch.comm.rendezvous import GRACE, Meeting
from distpatch.comm.transport import Factory, Transport, factory
from distpatch.errors import DistPatchError, LayoutError, RankError
from distpatch.profiling.trace import Recorder
from distpatch.torch_utils import private

T = TypeVar("T")
Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | SimulatedCommunicator | None"
Parts: TypeAlias = "list[tuple[int, list[Tensor]]]"  # by peer: the pieces of one message, in order


class Policy(Protocol):
    """What becomes of a rule's transfers, where they are not to be waited for (diffusion/displaced.py).

    ``key``: what all ranks know of the transfer, to tell one call site from another.
    """

    def exchange(self, op: str, key: tuple[Any, ...], sends: Parts, recvs: Parts, device: torch.device) -> None:
        """Fill the parts of ``recvs``, by peer, from what the ranks send with this call or sent before."""

    def moments(self, op: str, counts: Sequence[int], mean: Tensor, m2: Tensor) -> tuple[int, Tensor, Tensor]:
        """Count, mean and centred second moment of all ranks' samples; ``counts``: how many each rank has."""


class Communicator(Meeting):
    """One rank's end of a group.

    Transfers run on a duplicate of the user's group: point-to-point messages that share a
    communicator with the user's own collectives can be matched with the wrong ones. The handshake
    runs on the group's key-value store. ``Communicator(None)`` is a group of this rank alone. Both groups
    are referred to weakly: torch keeps them while they are open, and a closed one must be freed.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None:
            super().__init__(None, 0, 1, GRACE)  # nobody is waited for in a group of one
        else:
            super().__init__(group.get_group_store(), group.rank(), group.size(), process_groups.timeout_of(group))
        self._group: Callable[[], dist.ProcessGroup | None] = _nothing if group is None else weakref.ref(group)
        self._pg: Callable[[], dist.ProcessGroup | None] = _nothing
        self.recorder = Recorder()
        self.name = ""
        self.device: torch.device | None = None  # that the duplicate was made on
        self.broken = False
        self.by_collectives = False  # rows move by all_gather: point to point is broken here (self_test)
        self.policy: Policy | None = None  # of the step that runs now, where it is a displaced one
        self.async_comm: Communicator | None = None  # another duplicate, for what runs behind the computation
        self.async_for = ""  # of a lane: the name of whose it is
        self._opened: set[torch.device] = set()
        self._made_by: Factory | None = None
        self._transports: dict[torch.device, Transport] = {}

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The user's group, or None where there is none or it is closed."""
        return self._group()

    @property
    def pg(self) -> dist.ProcessGroup | None:
        """The duplicate that transfers run on."""
        return self._pg()

    def connect(self, given: torch.device | None = None) -> None:
        """Create the group's duplicate and open its channels; every rank of the group calls it.

        ``given``: where the tensors are that will move, if that is known. Raises ``RankError`` where the ranks'
        devices cannot be connected, such as one GPU for two of them.
        """
        group = self.group
        if group is None or (self.pg is not None and not self.broken):
            return
        device = self.device = devices.choose(group, given or self.device)
        devices.check(self.agree("set-up", "", devices.identity(group, device)), self.rank)
        with devices.current(device):
            pg = process_groups.by_members(
                dist.get_process_group_ranks(group),
                self.new_name(group.group_name),
                backend=str(dist.get_backend_config(group)),
                timeout=self.timeout,
            )
        self._pg = weakref.ref(pg)
        self.name = f"{pg.group_name} {self.rank}/{self.size}"
        self.broken = False
        self._transports, self._opened = {}, {device}
        _by_pg[pg] = self
        self.warmup()

    def warmup(self) -> None:
        """Open the channels for tensors of the communicator's device; every rank of the group calls it."""
        if self.device is not None:
            self._open(self.transport(self.device), self.device)

    def transport(self, device: torch.device) -> Transport:
        """How tensors of this device travel. The first time every rank of the group calls it: it opens the channels.

        Raises ``RankError`` where the last transfers of the group failed: what their messages did, nobody knows.
        """
        if self.broken:
            raise RankError(
                f"the transfers of this group have failed and were given up (this is rank {self.rank}). The next "
                "call of a converted model begins anew, on all ranks."
            )
        if self._made_by is not factory():
            self._made_by, self._transports = factory(), {}
        made = self._transports.get(device)
        if made is None:
            made = self._transports[device] = self._make(device)
        return ByAllGather(made, self.rank, self.size, self.recorder) if self.by_collectives else made

    def _make(self, device: torch.device) -> Transport:
        pg = self.pg
        if pg is None:
            raise RankError(f"the process group is closed (this is rank {self.rank})")
        made = factory()(pg, device)
        if device not in self._opened:
            if device.type != "cpu":
                devices.check(self.agree("set-up of a device", "", devices.identity(pg, device)), self.rank)
            self._opened.add(device)
            self._open(made, device)
        return made

    def _open(self, transport: Transport, device: torch.device) -> None:
        """One collective goes first: communicators are made lazily.

        A first point-to-point batch that not all ranks join hangs, or fails under CUDA-graph capture.
        """
        with devices.current(device):
            wait_or_raise(self, "set-up", lambda: transport.open(device), None)

    @property
    def closed(self) -> bool:
        """Whether the group, or its duplicate, was destroyed."""
        return not all(pg is not None and private.is_open(pg) for pg in (self.group, self.pg))

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

    def abort_call(self, note: str) -> None:
        """Say that this rank gives up the call, and why, for the others to read; the first note counts."""
        self.broken = True
        if self.name and not self.closed:
            self.leave_note(note)

    def planned(self, kind: str, op: str, sent_bytes: int, messages: int) -> None:
        """Where tensors are fake, what this rank would send: of a group that exists, a real run records it."""


class SimulatedCommunicator(Communicator):
    """One rank of a group that does not exist, for fake tensors: of transfers only the shapes are known.

    ``rank`` and ``size`` of the group. Passed to ``convert_model`` in place of a group, under a
    ``FakeTensorMode``.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(None)
        self.rank, self.size, self.name = rank, size, f"rank {rank} of {size}, simulated, {id(self)}"
        _simulated[self.name] = self

    def agree(self, what: str, signature: str, payload: dict[str, object] | None = None) -> list[dict[str, object]]:
        return [payload or {}] * self.size

    def transport(self, device: torch.device) -> Transport:
        raise DistPatchError("a simulated group sends nothing: it is for fake tensors (FakeTensorMode)")

    def enter(self, what: str, signature: str, payload: dict[str, object] | None = None) -> list[dict[str, object]]:
        """There is nobody to meet."""
        return [{"broken": False, **(payload or {})}]

    def abort_call(self, note: str) -> None:
        """There is nobody to tell."""

    def planned(self, kind: str, op: str, sent_bytes: int, messages: int) -> None:
        self.recorder.record(kind, op, sent_bytes, messages)


def _nothing() -> None:
    return None


# Weak keys: a communicator is known as long as the group is open, and each thread-rank has groups of its own.
_by_group: weakref.WeakKeyDictionary[dist.ProcessGroup, Communicator] = weakref.WeakKeyDictionary()
_by_pg: weakref.WeakKeyDictionary[dist.ProcessGroup, Communicator] = weakref.WeakKeyDictionary()
_simulated: weakref.WeakValueDictionary[str, SimulatedCommunicator] = weakref.WeakValueDictionary()
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
    if isinstance(group, SimulatedCommunicator):
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


def group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A new group of these global ranks, of the default group's kind; each of them calls it, and nobody else."""
    world = c10d._get_default_group()
    label = "_".join(map(str, ranks))
    store = c10d.PrefixStore(f"distpatch/{label}", world.get_group_store())
    meeting = Meeting(store, ranks.index(dist.get_rank()), len(ranks), process_groups.timeout_of(world))
    meeting.agree("set-up of a group", str(list(ranks)))
    return process_groups.by_members(ranks, meeting.new_name(f"of {label}"), timeout=meeting.timeout)


def communicator_of(name: str) -> Communicator:
    """The communicator of this name, as custom ops carry it: its own group's, and this rank's place in it.

    A compiled graph is cached by its operators' arguments, and made for one rank alone.
    """
    if not name:
        return ALONE
    return _simulated.get(name) or _by_pg[private.group_named(name.rpartition(" ")[0])]


def warmup(group: Group) -> None:
    """Open the channels of a group before the first use, so that it costs nothing then."""
    communicator(group).warmup()


def wait_or_raise(comm: Communicator, what: str, wait: Callable[[], T], peer: int | None) -> T:
    """Run one wait of a transfer; a failure becomes a ``RankError`` that names the rank waited for."""
    try:
        return wait()
    except DistPatchError:
        raise
    except Exception as error:
        blamed = f"rank {peer}" if peer is not None else "another rank"
        said = "" if peer is not None else f" ({type(error).__name__}: {error})"  # it may be this rank's own fault
        late = any(word in str(error).lower() for word in ("timeout", "timed out"))
        waited = "timed out waiting for" if late else "failed waiting for"
        comm.abort_call(f"{waited} {blamed}{said}")
        others = [rank for rank in range(comm.size) if rank != comm.rank] if peer is None else [peer]
        try:
            missing = comm.ranks_without_note() if peer is None else []  # a collective does not say who is missing
            if missing:
                blamed = f"another rank of the group (no word from {', '.join(f'rank {r}' for r in missing)})"
        except (RuntimeError, dist.DistError):
            pass  # abort_note() says that the store is gone
        reasons = "".join(comm.abort_note(rank) for rank in others)
        raise RankError(f"{what}: rank {comm.rank} {waited} {blamed}{reasons} ({error})") from error
