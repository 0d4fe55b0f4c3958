"""What goes into a call of a converted model and comes out of it, of any structure: as on one device."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import types
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import attr
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal

import distpatch
from distpatch import LayoutError, PatchTensor, RankError
from distpatch.torch_utils.tree import tensors_in
from tests.support.calls import SHAPE, WORLDS, Frozen, Net, Slots, compare, cyclic, image, ranked
from tests.support.oracle import random_tensor
from tests.support.threads import rank_outcomes


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    y: Tensor
    note: str = "note"


class Point(namedtuple("Point", "y")):
    def __new__(cls, y: Tensor, scale: float = 1.0) -> Point:  # takes other arguments than it has fields
        return super().__new__(cls, y * scale)


class Lazy:
    def __init__(self, y: Tensor) -> None:
        self.y = y

    @functools.cached_property
    def double(self) -> Tensor:
        return self.y * 2


def with_cache(y: Tensor) -> Lazy:
    lazy = Lazy(y)
    lazy.double  # noqa: B018
    return lazy


Attrs = attr.make_class("Attrs", ["y"], frozen=True, slots=True)
RETURNED: dict[str, Callable[[Tensor], Any]] = {
    "frozen": Frozen,
    "slots": Slots,
    "frozen, slots": FrozenSlots,
    "attrs": Attrs,
    "named tuple with a constructor": Point,
    "nested": lambda y: types.SimpleNamespace(a=[types.SimpleNamespace(b={"c": Frozen(y)})]),
    "set": lambda y: {y, y[:, :1]},
    "frozenset": lambda y: frozenset([(y, 1)]),
    "deque": lambda y: deque([y, y], maxlen=2),
    "ordered dict": lambda y: OrderedDict(a=y),
    "default dict": lambda y: defaultdict(list, a=[y]),
    "chain map": lambda y: ChainMap({"a": y}, {"a": y * 2}),
    "mapping proxy": lambda y: types.MappingProxyType({"a": y}),
    "user dict": lambda y: UserDict(a=y),
    "dict keys": lambda y: {y: 1},
    "values": lambda y: {"a": y}.values(),
    "items": lambda y: {"a": y}.items(),
    "partial": lambda y: functools.partial(torch.add, y, other=y),
    "cyclic": cyclic,
    "cached property": with_cache,
    "torch.return_types": lambda y: y.max(1),
    "Normal": lambda y: Normal(y, y.exp()),
    "Independent": lambda y: Independent(Normal(y, y.exp()), 3),
    "Bernoulli": lambda y: Bernoulli(logits=y),
    "Categorical": lambda y: Categorical(logits=y),
    "mixture": lambda y: MixtureSameFamily(Categorical(torch.ones(SHAPE)), Normal(y, y.exp())),
    "packed sequence": lambda y: nn.utils.rnn.pack_padded_sequence(y.flatten(2).permute(2, 0, 1), [3]),
    "generator": lambda y: (y * i for i in range(3)),
    "map": lambda y: map(torch.neg, [y]),
    "generator inside": lambda y: {"frames": zip([y], [1])},
}


@pytest.mark.parametrize("make", RETURNED.values(), ids=RETURNED)
def test_results_of_any_structure(make: Any) -> None:
    net, x = Net(lambda net, y: make(y)), random_tensor(SHAPE)

    def run(net: Any, rank: int = 0) -> Any:
        inputs = x.clone().requires_grad_()
        result = listed(net(inputs))
        tensors = [t for t in tensors_in(result) if t.requires_grad]
        grads = torch.autograd.grad(sum(t.square().sum() for t in tensors), inputs) if tensors else ()
        with torch.no_grad():
            return [result, *grads, listed(net(x))]

    right = run(net)
    for world in WORLDS:
        results = ranked(net, run, world)
        compare(results, right, "result")
        assert type(results[0][0]) is type(right[0])


def listed(result: Any) -> Any:
    if isinstance(result, dict) and "frames" in result:
        return {"frames": list(result["frames"])}
    return list(result) if isinstance(result, Iterator) else result


def test_what_is_shared_stays_shared() -> None:
    def body(net: Any, rank: int) -> None:
        with distpatch.trace() as t:
            first, inner = net(random_tensor(SHAPE))
        assert first is inner["again"]
        assert sum(record.op == "output" for record in t.records) == 1
        assert net.last is first

    def then(net: Net, y: Tensor) -> Any:
        net.last = y
        return [y, {"again": y}]

    ranked(Net(then), body, 2)


def test_sets_of_tensors_alike_are_refused() -> None:
    def body(net: Any, rank: int) -> None:
        with pytest.raises(LayoutError, match=r"alike \(PatchTensor of \(1, 3, 7, 5\).*use a list"):
            net(random_tensor(SHAPE))

    ranked(Net(lambda net, y: {y, y * 2}), body, 2)


class Stream(nn.Module):
    """Yields frames, as they are decoded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1).double()
        self.closed = 0

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        try:
            for frame in x.unbind(2):
                x = self.conv(frame)
                factor = yield x
                self.conv.cache = x if factor is None else x * factor
        finally:
            self.closed += 1
        return x * 2

    def decode(self, x: Tensor) -> Iterator[Tensor]:
        last = yield from self(x)
        yield last


@pytest.mark.parametrize("world", WORLDS)
def test_generators_as_entry_points(world: int) -> None:
    """Each value is made when it is asked for, on all ranks; a generator may be left before its end."""
    x = random_tensor((1, 3, 4, 7, 5)).unbind(2)
    x = torch.stack(x, 2)

    def run(net: Any, rank: int = 0) -> Any:
        frames = list(net.decode(x))
        some = list(itertools.islice(net(x), 2))
        other = net(x.requires_grad_(False))
        sent = [next(other), other.send(3.0)]
        other.close()
        assert net.closed == 3 and not any(isinstance(f, PatchTensor) for f in frames)
        return frames, some, sent, net(x).__next__()

    compare(ranked(Stream(), run, world), run(Stream()), "frames")


def test_a_rank_that_stops_asking_is_named() -> None:
    model = Stream()

    def body(rank: int) -> None:
        net = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD)
        frames = net(random_tensor((1, 3, 4, 7, 5)))
        for _ in range(1 + rank):
            next(frames)

    outcomes = rank_outcomes(2, body, timeout=1.0)
    assert isinstance(outcomes[1], RankError) and "Stream.forward, value 2: rank(s) [0]" in str(outcomes[1])


# Arguments of any structure: their images are sharded, and what is written to them is there afterwards.
def total(net: Net, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = [t for t in tensors_in((args, kwargs)) if t.ndim == 4]
    assert all(isinstance(t, PatchTensor) for t in found) == isinstance(y, PatchTensor)
    return sum(found, y)


def store(net: Net, y: Tensor, cache: Any) -> Tensor:
    y = y + sum(t for t in tensors_in(cache))
    if isinstance(cache, dict):
        cache["rows"], cache["new"] = y, [y * 2]
    elif isinstance(cache, (list, deque)):
        cache[0] = y
        cache.append(y)
    else:
        cache.rows = y
    return y


def scale_input(net: Net, y: Tensor, x: Tensor) -> Tensor:
    x[:, :, 1:].mul_(2)
    return y + x


GIVEN: dict[str, tuple[Any, Callable[[], Any]]] = {
    "frozen": (total, lambda: Frozen(image())),
    "slots": (total, lambda: Slots(image())),
    "nested": (total, lambda: types.SimpleNamespace(a=[Frozen(image())])),
    "set": (total, lambda: {image()}),
    "deque": (total, lambda: deque([image()])),
    "distribution": (total, lambda: Normal(image(), image().exp())),
    "cyclic": (total, lambda: cyclic(image())),
    "dict that is written to": (store, lambda: {"rows": image()}),
    "empty dict": (store, dict),
    "list that is written to": (store, lambda: [image()]),
    "list of nothing": (store, lambda: [None]),
    "deque that is written to": (store, lambda: deque([image()], maxlen=3)),
    "object that is written to": (store, lambda: types.SimpleNamespace(rows=image(), name="cache")),
    "slots that are written to": (store, lambda: Named(image())),
    "image that is written to": (scale_input, image),
}


class Named:
    __slots__ = ("rows",)

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


@pytest.mark.parametrize(("then", "make"), GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("world", WORLDS)
def test_arguments_of_any_structure(then: Any, make: Any, world: int) -> None:
    x = random_tensor(SHAPE)

    def run(net: Any, rank: int = 0) -> Any:
        given = make()
        with torch.no_grad():
            outputs = [net(x, given) for _ in range(3)]
        return outputs, given

    net = Net(then)
    results = ranked(net, run, world)
    compare(results, run(net), "argument")
    assert not any(isinstance(t, PatchTensor) for t in tensors_in(results))


def test_arguments_are_compared_wherever_they_are() -> None:
    model = Net(total)

    def body(rank: int) -> None:
        net = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD)
        net(image(), Frozen(random_tensor((1, 3, 7, 5 + rank))))

    outcomes = rank_outcomes(2, body)
    assert all(isinstance(error, RankError) and "(1, 3, 7, 6)" in str(error) for error in outcomes)


def test_generators_as_arguments() -> None:
    """What they yield is compared and sharded when the model asks for it; they may call a converted model."""

    def then(net: Net, y: Tensor, frames: Iterator[Tensor]) -> Tensor:
        for frame in frames:
            assert isinstance(frame, PatchTensor) == isinstance(y, PatchTensor)
            y = y + net.conv(frame)
        return y

    def run(net: Any, rank: int = 0) -> Tensor:
        return net(image(), (net(image() * i, iter(())) for i in range(3)))

    net = Net(then)
    compare(ranked(net, run, 2), run(net), "frames")

    def differ(rank: int) -> None:
        own = distpatch.convert_model(copy.deepcopy(net), dist.group.WORLD)
        own(image(), (random_tensor((1, 3, 7 + rank, 5)) for _ in range(2)))

    assert all("value 1 of an iterator" in str(error) for error in rank_outcomes(2, differ))
