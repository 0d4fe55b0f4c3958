"""Whether the ranks of a group can reach each other, and whether what arrives is what was sent.

Everything here compares with values that are known before: a transport that loses or changes a message
would otherwise give a picture with wrong rows.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distpatch.comm import devices
from distpatch.comm.all_gather_transport import ByAllGather
from distpatch.comm.collectives import stack_ranks, sum_partials
from distpatch.comm.communicator import Communicator, Group, communicator
from distpatch.comm.rendezvous import GRACE
from distpatch.comm.row_exchange import fetch_rows
from distpatch.comm.transport import Batch
from distpatch.errors import RankError
from distpatch.layout.rows import even_bounds

SIZES = (1, 1000, *[1 << 20] * 3, *[1] * 5)  # elements of fp32 in a message; the last ones for rate and latency
LONGEST = max(SIZES)
SHOWN = 20  # faults that a rank tells the others about
COLUMNS = 8
EVENT_SECONDS = 0.01


@dataclass(frozen=True)
class Fault:
    """What went wrong between two ranks; a rank is None where it cannot be told which."""

    test: str
    sender: int | None
    receiver: int | None
    problem: str

    def __str__(self) -> str:
        ends = ["an unknown rank" if rank is None else f"rank {rank}" for rank in (self.sender, self.receiver)]
        return f"{self.test}, {ends[0]} to {ends[1]}: {self.problem}"


@dataclass(frozen=True)
class Link:
    """One pair of ranks: the time of a message of 4 bytes each way, and the rate of 4 MiB each way."""

    ranks: tuple[int, int]
    microseconds: float
    mib_per_second: float


@dataclass
class SelfTest:
    """What ``self_test`` found; the same on every rank.

    ``absent``: ranks that did not answer; ``by_collectives``: the group's rows now move by all_gather, because
    point to point is broken.
    """

    world_size: int
    faults: list[Fault] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)
    by_collectives: bool = False

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def raise_for_faults(self) -> None:
        """Raise ``RankError`` with all faults, if there is one."""
        if self.faults:
            raise RankError("self-test failed:\n" + "\n".join(f"  {fault}" for fault in self.faults))


def self_test(group: Group, *, fallback: bool = True) -> SelfTest:
    """Send known values between every pair of ranks, and by halo, gather and sum; name the pairs that fail.

    Every rank of the group calls it, at start: it opens the group's channels. Pairs are tested in rounds, each
    rank with one other at a time. A rank that does not come within the group's timeout, or whose message does
    not, is a fault, and not an exception. ``fallback``: where a pair fails but collectives are right, rows of this
    group move by all_gather from then on: slower, and said in a warning.

    Returns what was found. Raises ``RankError`` where this rank is no member of the group.
    """
    comm = communicator(group, connect=False)
    report = SelfTest(comm.size)
    if not comm.has_peers:
        return report
    timeout = comm.rendezvous.timeout
    _, missing = comm.rendezvous.collect({}, timeout)
    if missing:
        report.absent, report.faults = list(missing), _absent(comm, list(missing), "start", timeout)
        return report
    tested = _Tester(comm, report)
    with devices.current(tested.device):
        if tested.run("set-up", tested.connect):
            _test_all(tested, fallback)
    if report.by_collectives:
        warnings.warn(
            f"point-to-point transfers are broken in this group of {comm.size} ranks ({report.faults[0]}). Its rows "
            "now move by all_gather: the values are right, but every transfer is slower. Run `distpatch doctor` "
            "for all faults.",
            stacklevel=2,
        )
    return report


def _test_all(tested: _Tester, fallback: bool) -> None:
    comm, report = tested.comm, tested.report
    comm.use()  # nothing but the transport itself
    for number, pairs in enumerate(rounds(comm.size), 1):
        partner = pairs.get(comm.rank)
        if not tested.run(f"point to point, round {number}", partial(tested.pair, partner)):
            return
    broken = bool(report.faults)
    right = tested.run("all_gather", tested.stack) and tested.run("all_reduce", tested.sum)
    if not right:
        return
    if broken:
        if not fallback or any(fault.test in {"all_gather", "all_reduce"} for fault in report.faults):
            return
        comm.use(lambda inner: ByAllGather(inner, comm.rank, comm.size))
    known = len(report.faults)
    finished = tested.run("halo", tested.halo) and tested.run("gather", tested.gather)
    report.by_collectives = broken and finished and len(report.faults) == known
    if not report.by_collectives:
        comm.use()


class _Tester:
    """Runs one test after the other on this rank, and shares what all ranks found after each."""

    def __init__(self, comm: Communicator, report: SelfTest) -> None:
        assert comm.group is not None
        self.comm, self.report = comm, report
        self.device = comm.device or devices.choose(comm.group, None)
        self.link: Link | None = None

    def run(self, test: str, body: Callable[[], list[Fault]]) -> bool:
        """One test on all ranks, and whether the next one can follow."""
        comm, broken = self.comm, False
        try:
            faults = body()
        except RuntimeError as error:  # RankError too
            faults, broken = [Fault(test, None, comm.rank, str(error))], True
            comm.give_up()
        link, self.link = self.link, None
        mine = {
            "faults": [asdict(fault) for fault in faults[:SHOWN]],
            "broken": broken or comm.broken,
            "link": astuple(link) if link else None,
        }
        # Others may have waited for a message, one timeout long, before they come here.
        patience = 2 * comm.rendezvous.timeout + GRACE
        answers, missing = comm.rendezvous.collect(mine, patience)
        if missing:
            self.report.absent = list(missing)
            self.report.faults += [*faults, *_absent(comm, list(missing), test, patience)]
            return False
        for answer in answers:
            self.report.faults += [Fault(**fault) for fault in answer["faults"]]
            if answer["link"]:
                (low, high), *measured = answer["link"]
                self.report.links.append(Link((low, high), *measured))
        if any(answer["broken"] for answer in answers):
            if self.device.type == "cuda" or test == "set-up":
                return False  # its stream waits for a message that will not come
            comm.give_up()
            comm.connect()
        return True

    def connect(self) -> list[Fault]:
        self.comm.connect(self.device)
        return []

    def pair(self, partner: int | None) -> list[Fault]:
        """Messages to and from one other rank, in one batch, as a halo's."""
        if partner is None:
            return []
        comm, test, seconds, problem = self.comm, "point to point", [], ""
        for numel in SIZES:
            sent = _known(comm.rank, partner, numel, self.device)
            landed = torch.full_like(sent, -1)
            started = time.perf_counter()
            batch = Batch("self-test", [partner], [sent], [partner], [landed], self.device)
            try:
                comm.transport(self.device).exchange(batch)
                self._await(landed, partner)
            except RankError as error:
                return [Fault(test, partner, comm.rank, str(error))]
            seconds.append(time.perf_counter() - started)
            # A wrong message ends nothing: the partner, which may have got the right one, sends the next.
            problem = problem or _difference(landed, _known(partner, comm.rank, numel, self.device))
        if comm.rank < partner and not problem:
            best = {size: min(t for t, n in zip(seconds, SIZES, strict=True) if n == size) for size in (1, LONGEST)}
            rate = LONGEST * 4 / (1 << 20) / best[LONGEST]
            self.link = Link((comm.rank, partner), best[1] * 1e6, rate)
        return [Fault(test, partner, comm.rank, problem)] if problem else []

    def _await(self, landed: Tensor, partner: int) -> None:
        """On CUDA a transfer's wait() only queues: look at an event, so that a lost message blocks nobody."""
        if landed.device.type != "cuda":
            return
        arrived = torch.cuda.Event()
        arrived.record()
        patience = self.comm.rendezvous.timeout.total_seconds()
        deadline = time.monotonic() + 0.8 * patience  # before the backend's watchdog
        while not arrived.query():
            if time.monotonic() > deadline:
                self.comm.give_up()
                raise RankError(f"rank {self.comm.rank} timed out waiting for rank {partner}")
            time.sleep(EVENT_SECONDS * 0.1)

    def stack(self) -> list[Fault]:
        comm = self.comm
        mine = _known(comm.rank, comm.rank, 1000, self.device)
        stacked = stack_ranks(mine, comm.name, "self-test")
        expected = [_known(rank, rank, 1000, self.device) for rank in range(comm.size)]
        return self._compare("all_gather", [*enumerate(zip(stacked, expected, strict=True))])

    def sum(self) -> list[Fault]:
        comm = self.comm
        ranks = torch.arange(1000, device=self.device, dtype=torch.float64)
        total = sum_partials(ranks * (comm.rank + 1), comm.name, "self-test")
        problem = _difference(total, ranks * (comm.size * (comm.size + 1) // 2))
        return [Fault("all_reduce", None, comm.rank, problem)] if problem else []

    def halo(self) -> list[Fault]:
        """Two rows above and below each rank's own, of a height at which some come from beyond the neighbour."""
        size = 2 * self.comm.size - 1
        bounds = even_bounds(size, self.comm.size)
        needs = tuple(((max(lo - 2, 0), lo), (hi, min(hi + 2, size))) for lo, hi in pairwise(bounds))
        return self._rows("halo", bounds, needs)

    def gather(self) -> list[Fault]:
        bounds = even_bounds(3 * self.comm.size + 1, self.comm.size)
        return self._rows("gather", bounds, (((0, bounds[-1]),),) * self.comm.size)

    def _rows(self, test: str, bounds: tuple[int, ...], needs: Any) -> list[Fault]:
        comm = self.comm
        mine = _rows(bounds[comm.rank], bounds[comm.rank + 1], self.device)
        pieces = fetch_rows(mine, 2, bounds, needs, comm.name, f"self-test {test}", True)
        found = []
        for owner, (lo, hi) in enumerate(pairwise(bounds)):
            for piece, (start, stop) in zip(pieces, needs[comm.rank], strict=True):
                first, last = max(lo, start), min(hi, stop)
                if first < last:
                    rows = piece.narrow(2, first - start, last - first)
                    found.append((owner, (rows, _rows(first, last, self.device))))
        return self._compare(test, found)

    def _compare(self, test: str, found: list[tuple[int, tuple[Tensor, Tensor]]]) -> list[Fault]:
        problems = [(owner, _difference(*tensors)) for owner, tensors in found]
        return [Fault(test, owner, self.comm.rank, problem) for owner, problem in problems if problem]


def rounds(size: int) -> list[dict[int, int]]:
    """Every pair of ranks once, in rounds in which a rank has one partner or none (the circle method)."""
    seats = [*range(size), *[-1] * (size % 2)]
    schedule = []
    for _ in range(len(seats) - 1):
        pairs = [(a, b) for a, b in zip(seats, reversed(seats)) if a >= 0 and b >= 0]
        schedule.append(dict(pairs))
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return schedule


def _absent(comm: Communicator, missing: list[int], test: str, patience: timedelta) -> list[Fault]:
    """A rank that does not answer, seen from every rank that did."""
    seconds = patience.total_seconds()
    problem = f"no answer within {seconds:g} s: the rank is dead, stopped, or busy with something else"
    present = [rank for rank in range(comm.size) if rank not in missing]
    return [Fault(test, absent, rank, problem) for absent in missing for rank in present]


def _known(sender: int, receiver: int, numel: int, device: torch.device) -> Tensor:
    """Values that tell sender, receiver and place, exact in fp32."""
    values = torch.arange(numel, device=device, dtype=torch.int64) * 7 + sender * 8209 + receiver * 131
    return (values % (1 << 24)).float()


def _rows(first: int, last: int, device: torch.device) -> Tensor:
    """Global rows first:last of an image whose values tell row, column and channel."""
    rows = torch.arange(first, last, device=device, dtype=torch.float32).view(1, 1, -1, 1)
    columns = torch.arange(COLUMNS, device=device) * 1000.0
    return rows + columns + torch.arange(2, device=device).view(1, 2, 1, 1) * 100_000.0


def _difference(landed: Tensor, sent: Tensor) -> str:
    """The first element that is not as it was sent, or nothing. Reads the tensors back to the host."""
    wrong = (landed != sent).reshape(-1).nonzero()
    if not len(wrong):
        return ""
    place = int(wrong[0])
    came, was = (tensor.reshape(-1)[place].item() for tensor in (landed, sent))
    return (
        f"{len(wrong)} of {sent.numel()} elements are wrong; element {place} was sent as {was:g} and came as {came:g}"
    )
