"""A step that is not like the last one, a step that fails, and what is left afterwards."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from distpatch.diffusion.displaced_steps import Displaced
from distpatch.diffusion.stale_transport import POLICIES
from tests.support.oracle import random_tensor
from tests.support.threads import rank_outcomes, run_ranks
from tests.support.transports.delay import delayed
from tests.support.transports.late import late

ROWS, WIDTH, CHANNELS = 9, 4, 4
TEXT = random_tensor((1, 3, CHANNELS), 1)
OTHER_TEXT = random_tensor((1, 3, CHANNELS), 2)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Net(nn.Module):
    """Convolutions, norm, self-attention and attention to a text; two branches of the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(CHANNELS, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.branches = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.to_k = nn.Linear(CHANNELS, 8)
        self.last = nn.Conv2d(8, CHANNELS, 3, padding=1)
        self.path: list[int] = [0]
        self.fail = False
        self.double().eval()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = F.silu(self.norm(self.first(x)))
        for index in self.path:
            if index < 0:  # ends early
                return h[:, :CHANNELS]
            h = h + self.branches[index](h)
        if self.fail:
            raise ValueError("told to")
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + F.scaled_dot_product_attention(tokens, tokens, tokens)
        keys = self.to_k(text)
        tokens = tokens + F.scaled_dot_product_attention(tokens, keys, keys)
        return self.last(tokens.transpose(1, 2).reshape(h.shape))


NET = Net()  # thread-ranks share the generator: each copies this one


def image(step: int, rows: int = ROWS) -> Tensor:
    return random_tensor((1, CHANNELS, rows, WIDTH), 10) + 0.1 * random_tensor((1, CHANNELS, rows, WIDTH), step)


def alone(x: Tensor, text: Tensor = TEXT, path: list[int] | None = None) -> Tensor:
    net = copy.deepcopy(NET)
    net.path = path or [0]
    with torch.no_grad():
        return net(x, text)


def on_ranks(body: Callable[[Net, Displaced], Any], world: int = 3, **options: Any) -> list[Any]:
    """``body(net, steps)`` on every rank, with steps 0 and 1 of the warm-up and one displaced step made."""

    def rank_body(rank: int) -> Any:
        net = distpatch.convert_model(copy.deepcopy(NET), dist.group.WORLD, fallback="error")
        with torch.no_grad(), distpatch.displaced(net, warmup_steps=1, layers_per_message=2, **options) as steps:
            for step in range(3):
                result = net(image(step), TEXT)
                exact = torch.allclose(result, alone(image(step)), **CLOSE)
                assert exact == (step < 2 or POLICIES[options.get("policy", "stale_gn")].rows == "fresh")
            return body(net, steps)

    return run_ranks(world, rank_body, keep=True)


def exact(net: Net, steps: Displaced, x: Tensor, text: Tensor = TEXT, waited: bool = True) -> None:
    """A step that gives the values of one device, and whether it waited for its exchanges."""
    before = steps.synchronous
    torch.testing.assert_close(distpatch.gather(net(x, text)), alone(x, text, net.path), **CLOSE)
    assert (steps.synchronous > before) == waited


def stale(net: Net, steps: Displaced, x: Tensor, text: Tensor = TEXT) -> None:
    before = steps.synchronous
    assert not torch.allclose(distpatch.gather(net(x, text)), alone(x, text, net.path), **CLOSE)
    assert steps.synchronous == before


@pytest.mark.parametrize("policy", ["sync_gn", "stale_gn", "corrected_async_gn"])
def test_activations_that_stay_give_the_same_bits(policy: str) -> None:
    def body(rank: int) -> None:
        net = distpatch.convert_model(copy.deepcopy(NET), dist.group.WORLD)
        with torch.no_grad(), distpatch.displaced(net, warmup_steps=0, policy=policy) as steps:
            first = net(image(0), TEXT)
            for _ in range(3):
                assert torch.equal(net(image(0), TEXT), first)
            assert steps.synchronous == 1

    for world in (2, 3):
        run_ranks(world, body, keep=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_strict_transport(policy: str) -> None:
    with late():
        on_ranks(lambda net, steps: [net(image(step), TEXT) for step in range(3)], world=4, policy=policy)


@pytest.mark.parametrize("path", [[1], [0, 0], [0, 1], [], [0, -1]], ids=str)
def test_another_path(path: list[int]) -> None:
    """Another branch (of the same shapes), more calls, or fewer: the step is exact, the next one is displaced."""

    def body(net: Net, steps: Displaced) -> None:
        net.path = path
        if path:
            exact(net, steps, image(3))
        else:
            net(image(3), TEXT)
            assert steps.synchronous == 3
        stale(net, steps, image(4))
        net.path = [0]
        exact(net, steps, image(5))

    on_ranks(body)


def test_another_size() -> None:
    """Another picture: warm-up again."""

    def body(net: Net, steps: Displaced) -> None:
        for rows in (ROWS + 2, ROWS):
            exact(net, steps, image(3, rows))
            exact(net, steps, image(4, rows))
            stale(net, steps, image(5, rows))

    on_ranks(body)


def test_another_prompt() -> None:
    def body(net: Net, steps: Displaced) -> None:
        stale(net, steps, image(3), TEXT.clone())  # the same one, elsewhere in memory
        exact(net, steps, image(4), OTHER_TEXT)
        exact(net, steps, image(5), OTHER_TEXT)
        stale(net, steps, image(6), OTHER_TEXT)
        text = OTHER_TEXT.clone()
        stale(net, steps, image(7), text)
        text.copy_(TEXT)  # written to where it stands
        exact(net, steps, image(8), text)

    on_ranks(body)


def test_another_prompt_that_one_rank_sees_first() -> None:
    """What a rank finds out by itself, all do."""

    def body(rank: int) -> None:
        net = distpatch.convert_model(copy.deepcopy(NET), dist.group.WORLD)
        with torch.no_grad(), distpatch.displaced(net, warmup_steps=0) as steps:
            net(image(0), TEXT)
            net(image(1), TEXT)
            assert steps.synchronous == 1
            net(image(2), OTHER_TEXT if rank == 1 else TEXT)
            assert (steps.calls, steps.synchronous) == (1, 2)

    run_ranks(2, body, keep=True)


def test_reset_and_synchronize() -> None:
    def body(net: Net, steps: Displaced) -> None:
        distpatch.synchronize()
        assert all(batch.works is None for batch in steps.schedule.shared)
        stale(net, steps, image(3))
        steps.reset()
        exact(net, steps, image(4))
        exact(net, steps, image(5))
        stale(net, steps, image(6))

    on_ranks(body)


def test_a_step_left_out() -> None:
    """The step after it reads what was sent last; where nothing changes any more, that comes to be exact."""

    def body(net: Net, steps: Displaced) -> None:
        stale(net, steps, image(2))
        for _ in range(5):  # what is not as on one device yet stands one call site deeper each time
            net(image(2), TEXT)
        exact(net, steps, image(2), waited=False)

    on_ranks(body)


def test_text_once_a_prompt() -> None:
    def body(net: Net, steps: Displaced) -> None:
        (kept,) = steps.texts.values()
        stale(net, steps, image(3))
        assert next(iter(steps.texts.values())) is kept
        exact(net, steps, image(4), OTHER_TEXT)
        assert torch.equal(*steps.texts.values(), F.linear(OTHER_TEXT, net.to_k.weight, net.to_k.bias))

    on_ranks(body, once_per_prompt=["to_k"])

    def names(rank: int) -> None:
        net = distpatch.convert_model(copy.deepcopy(NET), dist.group.WORLD)
        for name, error in (("to_q", ValueError), ("last", distpatch.DistPatchError)):
            with pytest.raises(error, match=name), torch.no_grad(), distpatch.displaced(net, once_per_prompt=[name]):
                net(image(0), TEXT)
        assert "forward" not in net.last.__dict__

    run_ranks(1, names)


@pytest.mark.parametrize("failing", [(0, 1, 2), (1,)], ids=str)
def test_an_exception_in_the_middle_of_a_step(failing: tuple[int, ...]) -> None:
    """On all ranks, or on one: the others have finished the step, or are told. No hang; then warm-up again."""

    def body(rank: int) -> None:
        net = distpatch.convert_model(copy.deepcopy(NET), dist.group.WORLD, output="shard")
        with torch.no_grad(), distpatch.displaced(net, warmup_steps=1, layers_per_message=1) as steps:
            for step in range(4):
                net(image(step), TEXT)
            net.fail = rank in failing
            try:
                net(image(4), TEXT)
                assert rank not in failing
            except ValueError:
                assert rank in failing and steps.schedule is None
            except distpatch.RankError as error:  # the step was not finished here when the other gave up
                assert rank not in failing and "rank 1 raised ValueError: told to" in str(error)
            net.fail = False
            exact(net, steps, image(5))
            exact(net, steps, image(6))
            stale(net, steps, image(7))

    run_ranks(3, body, timeout=20)


def test_a_rank_that_ends() -> None:
    """The others learn which one, before the next step or in it."""

    def body(rank: int) -> None:
        net = distpatch.convert_model(copy.deepcopy(NET), dist.group.WORLD)
        with torch.no_grad(), distpatch.displaced(net, warmup_steps=0):
            for step in range(6):
                if rank == 1 and step == 4:
                    raise KeyError("gone")
                net(image(step), TEXT)

    first, gone, second = rank_outcomes(3, body, timeout=2)
    assert isinstance(gone, KeyError)
    for outcome in (first, second):
        assert isinstance(outcome, distpatch.RankError) and "[1]" in str(outcome), outcome


def test_leaving_early() -> None:
    """Buffers are freed, the model is as it was, and its next call is exact."""

    def body(rank: int) -> None:
        net = distpatch.convert_model(copy.deepcopy(NET), dist.group.WORLD)
        for leave in (StopIteration, None):
            try:
                with torch.no_grad(), distpatch.displaced(net, warmup_steps=0) as steps:
                    for step in range(3):
                        net(image(step), TEXT)
                    assert steps.schedule is not None and steps.schedule.buffer_bytes > 0
                    held = [weakref.ref(b) for batch in steps.schedule.shared for b in batch.landing.buffers.values()]
                    held += [weakref.ref(b) for batch in steps.schedule.shared for b in batch.outgoing.buffers.values()]
                    if leave is not None:
                        raise leave
            except StopIteration:
                pass
            gc.collect()
            assert held and not any(ref() is not None for ref in held)
            assert not any(module._forward_pre_hooks for module in net.modules())
            with torch.no_grad():
                torch.testing.assert_close(net(image(4), TEXT), alone(image(4)), **CLOSE)

    run_ranks(2, body, keep=True)


def test_refused() -> None:
    def body(rank: int) -> None:
        net = copy.deepcopy(NET)
        with pytest.raises(distpatch.DistPatchError, match="not converted"), distpatch.displaced(net):
            pass
        distpatch.convert_model(net, dist.group.WORLD)
        for options, match in (
            ({"policy": "lossy"}, "one of full_sync, .*got 'lossy'"),
            ({"warmup_steps": -1}, "at least 0"),
            ({"layers_per_message": 0}, "at least 1"),
        ):
            with pytest.raises(ValueError, match=match), distpatch.displaced(net, **options):
                pass
        with pytest.raises(distpatch.RankError, match="sync_gn|stale_gn"):
            distpatch.displaced(net, policy="sync_gn" if rank else "stale_gn").__enter__()
        with distpatch.displaced(net):
            with pytest.raises(distpatch.DistPatchError, match="already"), distpatch.displaced(net):
                pass
            with pytest.raises(distpatch.LayoutError, match=r"torch\.no_grad"):
                net(image(0), TEXT)

    run_ranks(2, body, keep=True)


def test_only_the_open_model_is_displaced() -> None:
    """Another model of the same ranks is exact meanwhile."""

    def body(net: Net, steps: Displaced) -> None:
        other = distpatch.convert_model(copy.deepcopy(NET), dist.group.WORLD)
        torch.testing.assert_close(other(image(3), TEXT), alone(image(3)), **CLOSE)
        stale(net, steps, image(3))

    on_ranks(body)


def test_what_a_model_gathers_is_of_this_step() -> None:
    """It leaves the sharded computation; halos of the same step are those of the last one."""

    class Gathers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = copy.deepcopy(NET.first)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(x), distpatch.gather(x)

    def body(rank: int) -> None:
        net = distpatch.convert_model(Gathers(), dist.group.WORLD)
        with torch.no_grad(), distpatch.displaced(net, warmup_steps=0):
            for step in range(3):
                convolved, gathered = net(image(step))
                assert torch.equal(gathered, image(step))
                assert torch.allclose(convolved, NET.first(image(step)), **CLOSE) == (step == 0)

    run_ranks(3, body, keep=True)


def test_what_is_sent_and_waited_for() -> None:
    """A displaced step sends what a plain one does, in fewer messages; of 50 ms on the way it waits for little."""

    def body(net: Net, steps: Displaced) -> None:
        with distpatch.trace() as plain:
            steps.reset()
            net(image(3), TEXT)
        net(image(3), TEXT)
        with distpatch.trace() as t:
            net(image(4), TEXT)
            time.sleep(0.06)
            net(image(5), TEXT)
        for ops in ({"conv2d", "group_norm"}, {"scaled_dot_product_attention"}):  # a plain norm brings the halo along
            sent = sum(r.sent_bytes for r in t.records if r.kind == "displaced" and r.op in ops)
            assert sent == 2 * sum(r.sent_bytes for r in plain.records if r.op in ops) > 0
        assert t.count("all_gather") == 0 and {record.op for record in t.records if record.kind == "p2p"} == {"output"}
        batches = len(steps.schedule.shared)
        assert 1 < batches < len(steps.schedule.sites)
        assert len(t.waits) == 2 * batches - batches  # of the first traced step: what was started in the trace
        assert all(wait.behind_s > 0.05 > wait.blocked_s for wait in t.waits[-batches:])
        assert "behind the computation" in t.table()

    with delayed(0.05):
        on_ranks(body)


def test_inference_mode() -> None:
    """Steps in inference mode and steps without gradients may take turns."""

    def body(net: Net, steps: Displaced) -> None:
        with torch.inference_mode():
            steps.reset()
            for step in range(3):
                net(image(step), TEXT)
        stale(net, steps, image(4))
        with torch.inference_mode():
            stale(net, steps, image(5))

    on_ranks(body)


def test_alone() -> None:
    """One rank, or no group: nothing is displaced."""

    def body(rank: int) -> None:
        for group in (None, dist.group.WORLD):
            net = distpatch.convert_model(copy.deepcopy(NET), group)
            with torch.no_grad(), distpatch.displaced(net, warmup_steps=0) as steps:
                for step in range(3):
                    exact(net, steps, image(step))

    run_ranks(1, body)


def test_halos_against_an_all_gather() -> None:
    """DistriFusion gives both edges of each convolution's input, but the first one's, to all others."""

    def body(net: Net, steps: Displaced) -> tuple[int, int]:
        sent = 0
        with distpatch.trace() as t:
            net(image(3), TEXT)
        sent = sum(record.sent_bytes for record in t.records if (record.kind, record.op) == ("displaced", "conv2d"))
        world = steps.comm.size
        edges = [2 * conv.in_channels * conv.padding[0] * WIDTH * 8 for conv in (net.branches[0], net.last)]
        return sent, (world - 1) * sum(edges)

    for world in (2, 3, 4):
        for sent, gathered in on_ranks(body, world):
            assert 0 < sent * world / 2 <= gathered
