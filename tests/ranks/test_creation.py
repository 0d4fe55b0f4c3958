"""Tensors made like a sharded one, and randomness with the values of one device.

The thread-ranks share the default generator: what draws from it is seeded and drawn under a lock, which
also shows that it waits for no other rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distpatch
from distpatch.rules.elementwise import random_rows
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

X = (2, 3, H, 5)
LOCK = threading.Lock()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def seeded(draw: Callable[..., Any]) -> Callable[..., Any]:
    def run(*tensors: Tensor) -> Any:
        with LOCK:
            torch.manual_seed(11)
            return draw(*tensors)

    return run


def drawn(name: str, *args: Any) -> Callable[[Tensor], Tensor]:
    """An in-place draw with a generator of its own, beside values that have a gradient."""
    return lambda x: getattr(torch.empty_like(x), name)(*args, generator=generator()) * x


def noisy(x: Tensor, weight: Tensor) -> Tensor:
    """StyleGAN's noise, as wide and high as the image, the same for every channel."""
    noise = torch.randn(x.shape[0], 1, *x.shape[2:], dtype=x.dtype, generator=generator())
    return x + noise * weight


def reparametrised(mean: Tensor, logvar: Tensor) -> Tensor:
    std = torch.exp(0.5 * logvar)
    return mean + std * torch.randn_like(std, generator=generator())


def canvas(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape)
    out[:, :, ::2] = 1
    return out * x


CASES = {
    "zeros_like": case(lambda x: torch.zeros_like(x) + x, X),
    "ones_like": case(lambda x: torch.ones_like(x, dtype=torch.float32), X),
    "full_like": case(lambda x: torch.full_like(x, 2.5) * x, X),
    "empty_like": case(lambda x: torch.empty_like(x).copy_(x), X),
    "channels_last": case(lambda x: torch.zeros_like(x) + x, X, channels_last=True),
    "new_zeros of its shape": case(lambda x: x + x.new_zeros(x.shape), X),
    "new_full": case(lambda x: x + x.new_full((1, 3, 1, 1), 2.0), X),
    "new_tensor": case(lambda x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0]), X),
    "new_empty": case(lambda x: x * x.new_empty(5).fill_(2) + x.new(5).zero_() + x.new_ones(1), X),
    "new_zeros of another height": case(lambda x: torch.cat([x, x.new_zeros(2, 3, 4, 5)], 2) * x.new_ones(2, 1, x.shape[2] + 4, 1), X),
    "a kernel of new_ones": case(lambda x: F.conv2d(x, x.new_ones(3, 3, 3, 3) / 9, padding=1), X),
    "new, written to": case(canvas, X),
    "arange of its height": case(lambda x: x * torch.arange(x.shape[2], dtype=x.dtype)[:, None], X),
    "meshgrid": case(
        lambda x: x * sum(torch.meshgrid(torch.arange(x.size(2)).float(), torch.linspace(0, 1, x.size(-1)), indexing="ij")), X
    ),
    "meshgrid of rows": case(lambda x: torch.meshgrid(x[0, 0, :, 0], x[0, 0, 0], indexing="ij"), X, fallback="meshgrid"),
    "randn of its shape": case(lambda x: x * torch.randn(x.shape, generator=generator()), X),
    "noise of a channel": case(noisy, X, (3, 1, 1)),
    "reparametrised": case(reparametrised, X, X, sharded=2),
    "randn_like": case(lambda x: x + torch.randn_like(x, generator=generator()), X),
    "randn_like, channels_last": case(lambda x: x + torch.randn_like(x, generator=generator()), X, channels_last=True),
    "randn_like, permuted": case(lambda x: x + torch.randn_like(x.permute(3, 2, 0, 1), generator=generator()).permute(2, 3, 1, 0), X),
    "randn_like of floats": case(lambda x: torch.randn_like(x, dtype=torch.float32, generator=generator()), X),
    "rand_like": case(lambda x: x * torch.rand_like(x, generator=generator()), X),
    "randint_like": case(lambda x: x * torch.randint_like(x, 2, 9, generator=generator()), X),
    "rand_like, seeded": case(seeded(torch.rand_like), X),
    "normal_": case(drawn("normal_", 1.0, 2.0), X),
    "normal_, channels_last": case(drawn("normal_"), X, channels_last=True),
    "uniform_": case(drawn("uniform_", -1, 2), X),
    "exponential_": case(drawn("exponential_"), X),
    "cauchy_": case(drawn("cauchy_"), X),
    "log_normal_": case(drawn("log_normal_"), X),
    "geometric_": case(drawn("geometric_", 0.3), X),
    "random_": case(drawn("random_", 3, 9), X),
    "bernoulli_": case(drawn("bernoulli_", 0.3), X),
    "bernoulli_ of a tensor": case(lambda x: x * torch.empty_like(x).bernoulli_(x.sigmoid(), generator=generator()), X),
    "bernoulli_ of rows": case(
        lambda x, p: x * torch.empty_like(x).bernoulli_(p.sigmoid(), generator=generator()), X, (2, 3, H, 5)
    ),
    "bernoulli": case(lambda x: torch.bernoulli(x.detach().sigmoid(), generator=generator()) * x, X),
    "bernoulli of a number": case(lambda x: torch.bernoulli(x.detach(), 0.3, generator=generator()) * x, X),
    "normal": case(lambda x: torch.normal(x.detach(), 0.5, generator=generator()), X),
    "normal of two": case(lambda x: torch.normal(x.detach() * 2, x.detach().exp(), generator=generator()), X),
    "normal of a spread": case(lambda x: torch.normal(1.0, x.detach().exp(), generator=generator()), X),
    "init": case(seeded(lambda x: nn.init.normal_(torch.zeros_like(x)) + nn.init.uniform_(torch.zeros_like(x), a=2, b=3)), X),
    "init by shape": case(seeded(lambda x: nn.init.kaiming_uniform_(torch.zeros_like(x))), X),
    "init by number": case(lambda x: nn.init.constant_(torch.zeros_like(x), 2.0) + nn.init.ones_(torch.zeros_like(x)), X),
    "dropout of nothing": case(lambda x: F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0), X),
    "dropout": case(seeded(lambda x: F.dropout(x, 0.3)), X),
    "dropout, channels_last": case(seeded(lambda x: F.dropout(x, 0.3)), X, channels_last=True),
    "dropout of all": case(seeded(lambda x: F.dropout(x, 1.0)), X),
    "dropout in place": case(seeded(lambda x: F.dropout(x * 1, 0.3, inplace=True)), X),
    "dropout of torch": case(seeded(lambda x: torch.dropout(x, 0.3, train=True)), X),
    "dropout of tokens": case(seeded(lambda x: F.dropout(x.flatten(2).transpose(1, 2), 0.3)), X),
    "dropout thrice": case(seeded(lambda x: F.dropout(F.dropout(F.dropout(x, 0.1), 0.2), 0.3)), X),
    "dropout module": case(seeded(lambda x: nn.Dropout(0.4)(x) + nn.Dropout(0.4).eval()(x)), X),
    "dropout2d": case(seeded(lambda x: F.dropout2d(x, 0.5)), X),
    "dropout2d of a sharded batch": case(seeded(lambda x: F.dropout2d(x, 0.5)), (H, 3, 4, 5), dim=0),
    "dropout1d of a sample": case(seeded(lambda x: F.dropout1d(x, 0.5)), (4, H), dim=-1),
    "dropout3d": case(seeded(lambda x: F.dropout3d(x, 0.5)), (2, 3, 4, H, 5)),
    "alpha_dropout": case(seeded(lambda x: F.alpha_dropout(x, 0.3, True)), X),
    "alpha_dropout in evaluation": case(lambda x: F.alpha_dropout(x, 0.3), X),
    "feature_alpha_dropout": case(seeded(lambda x: F.feature_alpha_dropout(x, 0.3, training=True)), X),
    "gumbel_softmax": case(seeded(lambda x: F.gumbel_softmax(x, 0.7, dim=1)), X),
    "gumbel_softmax, hard": case(seeded(lambda x: F.gumbel_softmax(x, hard=True, dim=-1)), X),
    "rrelu in evaluation": case(lambda x: F.rrelu(x), X),
    "rrelu in training": case(seeded(lambda x: F.rrelu(x, training=True)), X, worlds=(1,), fallback="rrelu"),
    "poisson": case(
        lambda x: torch.poisson(x.detach().exp(), generator=generator()), X, heights=(7,), fallback="poisson"
    ),
    "multinomial": case(
        lambda x: torch.multinomial(x.detach()[0, 0].exp(), 2, generator=generator()), X, heights=(7,), fallback="multinomial"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_creation(case: Callable[[], None]) -> None:
    case()


IN_PARTS = [name for name in CASES if any(part in name for part in ("_like", "_, ", "dropout")) or name.endswith("_")]


@pytest.mark.parametrize("name", [*IN_PARTS, "bernoulli of a number"])
def test_drawn_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, whichever rank's rows a part begins and ends in."""
    monkeypatch.setattr(random_rows, "PART", 2 * random_rows.TOGETHER)
    CASES[name](worlds=(1, 3))


def test_what_comes_in_parts() -> None:
    """On a CPU all that is drawn for an element by itself; what does not, is drawn whole."""
    draws = {
        "normal_": (), "uniform_": (), "exponential_": (), "random_": (3, 9), "cauchy_": (), "log_normal_": (),
        "geometric_": (0.3,), "bernoulli_": (0.3,),
    }  # fmt: skip
    for name, args in draws.items():
        for dtype in (torch.float32, torch.float64):
            for ndim in (1, 2, 4, 5):
                order = tuple(reversed(range(ndim)))

                def draw(t: Tensor, name: str = name, args: tuple[Any, ...] = args, **kwargs: Any) -> Tensor:
                    return getattr(t, name)(*args, **kwargs)

                assert random_rows._same_in_parts(draw, dtype, order), (name, dtype, ndim)
    assert not random_rows._same_in_parts(
        lambda t, generator: t.normal_(generator=generator).cumsum(0), torch.float32, (1, 0)
    )
    last = (1, 3, 2, 0)
    assert not random_rows._same_in_parts(lambda t, generator: t.normal_(generator=generator), torch.float32, last)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_memory_of_dropout(world: int) -> None:
    """A rank never has the mask of the whole, forward; backward it has some rows more (gradients of seams)."""
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(64, 64, 3, padding=1))
    x = torch.empty(1, 64, 512, 512, device="meta")
    for backward, most in ((False, 1.01), (True, 1.15)):
        alone, shared = (
            distpatch.plan(net, x, world_size=n, device="cpu", backward=backward, options={"output": "shard"})
            for n in (1, world)
        )
        assert max(rank.peak_bytes for rank in shared.ranks) <= most / world * alone.ranks[0].peak_bytes


def test_dropout_sends_nothing_and_keeps_its_rows() -> None:
    """The mask of the whole tensor is not held."""

    def body(rank: int) -> tuple[int, int]:
        x = distpatch.shard(random_tensor((1, 2, 8, 16)), dist.group.WORLD)
        held: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t)
        with distpatch.trace() as t, hooks, LOCK:
            F.dropout(x.requires_grad_(), 0.5)
        return len(t.records), sum(t.untyped_storage().nbytes() for t in held)

    for records, held_bytes in run_ranks(4, body):
        assert records == 0
        assert held_bytes <= 2 * 2 * 16 * 2, "a byte for each element of two rows (autograd saves it for two products)"


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1).double()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(x), 0.5) * x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_dropout_in_a_checkpoint_draws_the_same_again(use_reentrant: bool) -> None:
    def run(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return checkpoint(Dropping(), x, use_reentrant=use_reentrant)

    case(run, X, worlds=(1,))()
