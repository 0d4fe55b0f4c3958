"""Halo rows travel while rows are computed that need none: the same bits, fewer waits, and nothing read too early."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import distpatch
from distpatch.comm.choose_transport import between, using
from distpatch.comm.communicator import communicator
from distpatch.comm.transport import Batch, Finish, Layer, Transport, Works
from distpatch.lazy import recipe
from distpatch.tensor.options import Options
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import rank_outcomes, run_ranks
from tests.support.transports.delay import delayed
from tests.support.transports.late import late
from tests.support.transports.staged import maybe
from tests.support.zoo.models import tiny_autoencoder, tiny_kl, tiny_unet

MODES = {"at once": {"lazy": False, "splits": 1}, "in patches": {"lazy": False, "splits": 4}, "deferred": {"splits": 4}}


@pytest.fixture
def small_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any size are deferred."""
    monkeypatch.setattr(recipe, "LEAST_BYTES", 0)


class Down(nn.Sequential):
    """Windows of all kinds: strided, padded on one side, dilated, of even size, taller than a patch; a pool; a 1×1."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, padding=4, dilation=4),
            nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(8, 8, 7, padding="same"),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(8, 8, 4, padding="same"),
            nn.Conv2d(8, 4, 1),
            nn.SiLU(),
            nn.AvgPool2d(5, 2, 2),
        )
        self.double()


class Residual(nn.Module):
    """What is written over rows that a shortcut reads, with another window beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.shortcut, self.norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        x = self.second(F.silu(self.norm(self.first(F.silu(x))))) + self.shortcut(x)
        return F.silu(self.first(F.silu(x))) + x


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "kl": (lambda: tiny_kl(channels=(8, 8)), (random_tensor((1, 3, 40, 16)),)),
    "kl, float": (lambda: tiny_kl(dtype=torch.float32), (random_tensor((1, 3, 100, 75), dtype=torch.float32),)),
    "tiny": (lambda: tiny_autoencoder().decoder, (random_tensor((1, 4, 16, 8)),)),
    "unet": (tiny_unet, (random_tensor((1, 3, 24, 16)), 3)),
    "windows": (Down, (random_tensor((1, 3, 61, 12)),)),
    "few rows": (Down, (random_tensor((1, 3, 9, 12)),)),
    "residual": (Residual, (random_tensor((2, 4, 37, 8)),)),
}


def output(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.sample


@pytest.mark.usefixtures("small_rows_too")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_the_same_bits(name: str, mode: str, world: int) -> None:
    """Over a transport on which rows are NaN until they were waited for, and sent rows are read as late as may be."""
    make, args = NETS[name]
    model = make()
    right = output(model(*args))

    def body(rank: int) -> list[tuple[Tensor, distpatch.Trace]]:
        found = []
        for overlap in (False, True):
            own = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD, overlap=overlap, **MODES[mode])
            with torch.no_grad(), distpatch.trace() as t:
                found.append((output(own(*args)), t))
        return found

    with late():
        for (off, seen_off), (on, seen_on) in run_ranks(world, body):
            assert_same(on, right, 1e-11 if on.dtype == torch.float64 else 1e-4, f"{name}, {mode}")
            assert torch.equal(on, off)
            assert seen_on.records == seen_off.records
            assert seen_on.waits and not seen_off.waits


@dataclass
class Clock(TorchDispatchMode):
    """Tells the time by what this rank has computed: rows of convolutions, of one channel and column."""

    now: int = 0
    exposed: list[int] = field(default_factory=list)  # of each batch with messages: how long it was waited for

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "convolution" in func._schema.name:
            self.now += result.shape[-2]
        return result


DELAY = 4
of_rank = threading.local()  # its clock


@dataclass
class Due:
    """A ``Work`` that notes how much too early it was waited for."""

    clock: Clock
    due: int

    def wait(self) -> None:
        self.clock.exposed.append(max(self.due - self.clock.now, 0))


class Slow(Layer):
    """Messages land ``DELAY`` later by the clock of the rank that waits for them."""

    def post(self, batch: Batch) -> Works:
        works, clock = self.inner.post(batch), getattr(of_rank, "clock", None)
        return [*works, (Due(clock, clock.now + DELAY), None)] if works and clock else works


@torch.no_grad()
def test_fewer_waits() -> None:
    """A decoder shaped like Stable Diffusion's: a message that takes as long as 4 rows is waited for in no window.

    But for rows that come with the moments of a norm: these are waited for in any case.
    """
    # So wide that no map has fewer elements than its weights: such are put beside their halo, and wait for it.
    model, latents = tiny_kl(channels=(8, 8, 16, 16), dtype=torch.float32), random_tensor((1, 4, 16, 24)).float()

    def body(rank: int) -> list[tuple[Tensor, list[int]]]:
        found = []
        for overlap in (False, True):
            own = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD, overlap=overlap)
            with torch.no_grad(), Clock() as of_rank.clock:
                picture = own.decode(latents).sample
            found.append((picture, of_rank.clock.exposed))
            of_rank.clock = None
        return found

    def slow(pg: dist.ProcessGroup, device: torch.device) -> Transport:
        return Slow(between(pg, device))

    windows = sum(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in model.decoder.modules())
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.decoder.modules()) - 1  # one is of tokens
    with using(maybe(slow)):
        for (off, waited), (on, waited_behind) in run_ranks(2, body):
            assert torch.equal(off, on)
            assert waited == [DELAY] * (windows + 2)  # and attention, and what leaves
            assert sum(map(bool, waited_behind)) == norms + 2 and len(waited_behind) == windows + 2


@torch.no_grad()
def test_what_a_trace_says() -> None:
    """How long messages were under way before anybody waited for them, and how long then."""
    x, weight = random_tensor((1, 16, 256, 64)), random_tensor((16, 16, 3, 3))

    def body(rank: int) -> distpatch.Trace:
        with torch.no_grad(), distpatch.trace() as t:
            F.conv2d(distpatch.shard(x, dist.group.WORLD), weight, padding=1).local  # noqa: B018
        return t

    with delayed(0.005):
        traces = run_ranks(2, body)
    for t in traces:
        ((record,), (wait,)) = t.records, t.waits
        assert wait.op == "conv2d" and wait.behind_s > 0 and wait.blocked_s >= record.wait_seconds > 0
        assert "behind the computation" in t.table() and t.to_dict()["waits"][0]["op"] == "conv2d"
    # The delay, of the rank that sent first; to the other one the message may have been on its way for a while.
    assert max(wait.behind_s + wait.blocked_s for t in traces for wait in t.waits) >= 0.004


@torch.no_grad()
def test_what_was_sent_may_be_written_to_after_the_call() -> None:
    """Also on a rank that needs no rows of others."""
    x, weight = random_tensor((1, 2, 8, 4)), random_tensor((2, 2, 4, 3))
    x = x.contiguous(memory_format=torch.channels_last)  # rows are sent from where they stand

    def body(rank: int) -> Tensor:
        with torch.no_grad():
            rows = distpatch.shard(x.clone(), dist.group.WORLD)
            result = F.conv2d(rows, weight)
            rows.zero_()
            return distpatch.gather(result)

    with late():
        for result in run_ranks(3, body):
            assert_same(result, F.conv2d(x, weight), 1e-12, "rows sent before they were written to")


@pytest.mark.usefixtures("small_rows_too")
def test_rows_read_after_the_next_transfer_and_outside_of_inference_mode() -> None:
    x, weight = random_tensor((1, 4, 24, 6)), random_tensor((4, 4, 3, 3))

    def body(rank: int) -> list[Tensor]:
        rows = distpatch.shard(x, dist.group.WORLD)
        rows.region = replace(rows.region, options=Options(lazy=True, splits=3))
        with torch.inference_mode():
            first, second = (F.conv2d(each, weight, padding=1) for each in (rows, 2 * rows))
            assert first.is_deferred and second.is_deferred
        return [distpatch.gather(y).clone() for y in (second, first)]

    with late():
        for second, first in run_ranks(3, body):
            assert_same(first, F.conv2d(x, weight, padding=1), 1e-12, "first")
            assert_same(second, F.conv2d(2 * x, weight, padding=1), 1e-12, "second")


@pytest.mark.usefixtures("small_rows_too")
def test_rows_that_never_came_are_not_read() -> None:
    """A rank fails while others' halo is under way: what was deferred raises, however often it is asked for."""
    x, weight = random_tensor((1, 4, 24, 6)), random_tensor((4, 4, 3, 3))

    class Net(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.kept = rank, []

        def forward(self, x: Tensor) -> Tensor:
            if self.rank == 1:
                raise ValueError("on purpose")
            self.kept.append(F.conv2d(x, weight, padding=1))
            return self.kept[0].relu()

    def body(rank: int) -> None:
        net = distpatch.convert_model(Net(rank), dist.group.WORLD, splits=3)
        with torch.no_grad(), pytest.raises((distpatch.RankError, ValueError), match="on purpose"):
            net(x)
        for _ in range(2):
            for kept in net.kept:
                with pytest.raises(distpatch.RankError, match="conv2d"):
                    kept.local  # noqa: B018

    for outcome in rank_outcomes(3, body, timeout=5):
        assert outcome is None


@torch.no_grad()
def test_a_transfer_waits_for_what_was_begun() -> None:
    """Nothing else is sent before."""
    order: list[str] = []

    class Noted(Layer):
        def begin(self, batch: Batch) -> Finish:
            finish = super().begin(batch)
            order.append("begun")
            return lambda: (finish(), order.append("waited"))[0]

        def all_reduce(self, tensor: Tensor, op: str) -> None:
            order.append("reduce")
            super().all_reduce(tensor, op)

    def body(rank: int) -> None:
        comm = communicator(dist.group.WORLD)
        if rank == 0:
            comm.use(Noted)
        empty = Batch("test", [], [], [], [], torch.device("cpu"))
        begun = comm.begin(empty)
        comm.transport(torch.device("cpu")).all_reduce(torch.zeros(1), "test")
        begun.finish()

    run_ranks(2, body)
    assert order == ["begun", "waited", "reduce"]
