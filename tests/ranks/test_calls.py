"""What goes into a call of a converted model, comes out of it, and is kept between calls: as on one device."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import itertools
import types
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import attr
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal

import distpatch
from distpatch import DistPatchError, LayoutError, PatchTensor, RankError
from distpatch.torch_utils.tree import tensors_in
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import rank_outcomes, run_ranks

SHAPE = (1, 3, 7, 5)
WORLDS = (2, 3)


class Net(nn.Module):
    """A convolution, and what ``then(net, y, *args)`` makes of it."""

    def __init__(self, then: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1).double()
        self.then = then
        self.cache: dict[str, Any] = {}
        self.history: deque[Any] = deque(maxlen=2)
        self.box = types.SimpleNamespace()
        self.layers = [nn.Identity()]  # not registered
        self.plain = torch.zeros(SHAPE).double()
        self.register_buffer("last", torch.zeros(SHAPE).double())
        self.register_buffer("later", None)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        image = x if isinstance(x, Tensor) else next(tensors_in(x))
        return self.then(self, self.conv(image), *args, **kwargs)


def ranked(net: nn.Module, body: Callable[[Any, int], Any], world: int, **options: Any) -> list[Any]:
    def rank_main(rank: int) -> Any:
        return body(distpatch.convert_model(copy.deepcopy(net), dist.group.WORLD, fallback="allow", **options), rank)

    return run_ranks(world, rank_main, keep=True)


def compare(results: list[Any], right: Any, label: str) -> None:
    for result in results:
        got, wanted = list(tensors_in(result)), list(tensors_in(right))
        assert len(got) == len(wanted), label
        for value, expected in zip(got, wanted, strict=True):
            assert type(value) is type(expected), f"{label}: {type(value)}"
            assert_same(value.detach(), expected.detach(), 1e-10, label)


# What a model keeps: in its buffers it is plain after each call, elsewhere until it is restored.
def keep(where: str, make: Callable[[Tensor], Any] = lambda y: y) -> Callable[[Net, Tensor], Tensor]:
    def then(net: Net, y: Tensor) -> Tensor:
        before = getattr(net, where, None)
        setattr(net, where, make(y))
        return y if before is None else y + sum(t.sum() for t in tensors_in(before) if t.is_floating_point())

    return then


def write(put: Callable[[Net, Tensor], object]) -> Callable[[Net, Tensor], Tensor]:
    def then(net: Net, y: Tensor) -> Tensor:
        put(net, y.detach())
        return y * 2

    return then


BUFFERS: dict[str, Any] = {
    "bound": keep("last"),
    "bound, deferred": keep("last", F.silu),
    "where there was none": keep("later"),
    "written to": write(lambda net, y: net.last.__setitem__(slice(None), y)),
    "copied to": write(lambda net, y: net.last.copy_(y)),
    "some rows": write(lambda net, y: net.last.__setitem__((slice(None), slice(None), slice(2, 4)), y[:, :, 1:3])),
    "registered in the call": write(lambda net, y: net.register_buffer("fresh", y)),
    "of a module inside": write(lambda net, y: net.conv.register_buffer("seen", y, persistent=False)),
}


@pytest.mark.parametrize("then", BUFFERS.values(), ids=BUFFERS)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("grad", [False, True])
def test_buffers_are_plain_between_calls(then: Any, world: int, grad: bool) -> None:
    x = random_tensor(SHAPE)

    def run(net: Any, rank: int = 0) -> Any:
        net.float().double()  # buffers are other tensors than when the model was converted
        with torch.set_grad_enabled(grad):
            outputs = [net(x), net(x + 1)]
        state = net.state_dict()
        torch.save(state, io.BytesIO())
        net.load_state_dict(state)
        return outputs, dict(sorted(dict(net.named_buffers()).items()))

    net = Net(then)
    compare(ranked(net, run, world), run(copy.deepcopy(net)), "buffers")


KEPT: dict[str, Any] = {
    "attribute": keep("previous"),
    "attribute of a module inside": write(lambda net, y: setattr(net.conv, "previous", F.relu(y))),
    "module that is not registered": write(lambda net, y: setattr(net.layers[0], "previous", y)),
    "plain tensor, written to": write(lambda net, y: net.plain.__setitem__(slice(None), y)),
    "dict of lists": write(lambda net, y: net.cache.setdefault("rows", []).append(y)),
    "deque": write(lambda net, y: net.history.append(y)),
    "tuple": keep("previous", lambda y: (y, (y * 2,))),
    "set": keep("previous", lambda y: {y, y[:, :1]}),
    "object in an object": write(lambda net, y: setattr(net.box, "inner", types.SimpleNamespace(y=y))),
    "frozen": keep("previous", lambda y: Frozen(y)),
    "class": write(lambda net, y: setattr(type(net), "previous", y)),
    "closure of a hook": write(lambda net, y: None),
    "function's attribute": write(lambda net, y: setattr(net.hook, "y", y)),
}


@pytest.mark.parametrize(("name", "then"), KEPT.items(), ids=KEPT)
@pytest.mark.parametrize("world", WORLDS)
def test_what_is_kept_is_plain_in_the_restored_model(name: str, then: Any, world: int) -> None:
    x = random_tensor(SHAPE)

    def run(net: Any, rank: int = 0, converted: bool = True) -> Any:
        net.__class__ = type("Net", (Net,), {})
        net.conv = copy.deepcopy(net.conv)
        net.hook = lambda: None
        seen: dict[str, Any] = {}
        if "hook" in name:
            net.conv.register_forward_hook(lambda module, args, out: seen.update(out=out))
        outputs = [net(x), net(x + 1)]
        if converted:
            assert any(isinstance(t, PatchTensor) for t in [*gather_partial(net), *seen.values()])
            assert distpatch.restore_model(net) is net
            assert not any(isinstance(t, PatchTensor) for t in [*gather_partial(net), *seen.values()])
        with torch.no_grad(), distpatch.trace() as t:
            outputs.append(net(x + 2))
        assert not t.records or not converted
        copy.deepcopy(net.eval().requires_grad_(False).double()) if name != "attribute" else None
        return outputs

    net = Net(then)
    with torch.no_grad():
        right = run(copy.deepcopy(net), converted=False)

    def body(net: Any, rank: int) -> Any:
        with torch.no_grad():
            return run(net)

    compare(ranked(net, body, world), right, name)


def gather_partial(net: nn.Module) -> list[Tensor]:
    return [*tensors_in(net, modules=True), *tensors_in(dict(vars(type(net))), modules=True)]


ELSEWHERE: dict[int, Any] = {}


def test_what_others_keep_raises_by_name() -> None:
    """A cache outside the model is no part of it: it may be gathered, and is never met unawares."""
    kept = ELSEWHERE

    def then(net: Net, y: Tensor) -> Tensor:
        if net.rank in ELSEWHERE:
            y = y + ELSEWHERE[net.rank]
        ELSEWHERE[net.rank] = y
        return y

    x = random_tensor(SHAPE)

    def body(net: Any, rank: int) -> Tensor:
        net.rank = rank
        y = net(x)
        distpatch.restore_model(net)
        for function in (lambda: net(x), lambda: kept[rank] * 2, lambda: kept[rank].mean(), lambda: kept[rank].T):
            with pytest.raises(DistPatchError, match=rf"\(1, 3, 7, 5\).*rank {rank}.*distpatch\.gather\(x\)"):
                function()
        assert kept[rank].shape == SHAPE and "PatchTensor" in repr(kept[rank])
        kept[rank] = distpatch.gather(kept[rank])
        assert torch.equal(kept[rank], y)
        return net(x)

    compare(ranked(Net(then), body, 2), 2 * Net(lambda net, y: y)(x), "cache")
    ELSEWHERE.clear()


def test_a_sharded_result_is_the_callers() -> None:
    x = random_tensor(SHAPE)

    def body(net: Any, rank: int) -> Tensor:
        y = net(x)
        distpatch.restore_model(net)
        return distpatch.gather(y * 2)

    compare(ranked(Net(lambda net, y: y), body, 2, output="shard"), 2 * Net(lambda net, y: y)(x), "result")


def test_restoring_needs_the_group_where_something_is_kept() -> None:
    model, x = Net(keep("previous")), random_tensor(SHAPE)

    def closed(rank: int) -> None:
        group = dist.new_group([0, 1])
        net = distpatch.convert_model(copy.deepcopy(model), group)
        net(x)
        dist.destroy_process_group(group)
        with pytest.raises(DistPatchError, match=r"Net\.previous \(1, 3, 7, 5\).*before destroy_process_group"):
            distpatch.restore_model(net)
        net.previous = None
        net = distpatch.restore_model(net)
        net(x)

    run_ranks(2, closed)

    def alone(rank: int) -> None:
        net = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD)
        net(x)
        if rank == 0:
            distpatch.restore_model(net)

    assert "restore_model: rank(s) [1] of 2 did not call it" in str(rank_outcomes(2, alone, timeout=1.0)[0])


# What a model returns, of any structure.
@dataclasses.dataclass(frozen=True)
class Frozen:
    y: Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    y: Tensor


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


def cyclic(y: Tensor) -> Any:
    parent = types.SimpleNamespace(y=y)
    parent.children = [types.SimpleNamespace(parent=parent, y=y), parent]
    return parent


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


def image() -> Tensor:
    return random_tensor(SHAPE, seed=1)


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


# A user's own classes of tensor.
class Marked(Tensor):
    """As torch makes one: the class stays, attributes do not."""


class Scaled(Tensor):
    """Its results have its attribute."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        scale = next((t.scale for t in tensors_in((args, kwargs)) if hasattr(t, "scale")), None)
        if isinstance(result, cls) and scale is not None:
            result.scale = scale
        return result


class Plain(Tensor):
    """Results are plain, as those of torchvision's tv_tensors are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(Tensor) if isinstance(result, Tensor) else result


def scaled(x: Tensor) -> Tensor:
    result = x.as_subclass(Scaled)
    result.scale = 3.0
    return result


def meta(x: Tensor) -> Tensor:
    return MetaTensor(x, affine=2 * torch.eye(4), meta={"name": "scan", "list": [1]})


CLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "without an own function": lambda x: x.as_subclass(Marked),
    "with attributes": scaled,
    "plain results": lambda x: x.as_subclass(Plain),
    "MetaTensor": meta,
    "parameter": nn.Parameter,
    "buffer": nn.Buffer,
}


def facts(tensor: Tensor) -> Any:
    described = {name: value for name, value in vars(tensor).items() if not isinstance(value, Tensor)}
    described.pop("_meta", None)
    info = getattr(tensor, "meta", {}) if isinstance(tensor, MetaTensor) else {}
    return type(tensor).__name__, described, {key: str(value) for key, value in info.items()}


class Small(nn.Module):
    """With rows that are deferred where they are large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 3, 1, 1))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, label: Any = None) -> Any:
        y = self.body(F.interpolate(x, scale_factor=2.0) + 1)
        return {"image": y, "mean": y.mean((2, 3)), "label": label, "scale": self.scale, "same": F.silu(x)}


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [7, 301])
def test_a_users_own_class_of_tensor(make: Any, grad: bool, rows: int) -> None:
    """Type and attributes of results are those of one device, below and above what is deferred, on any number of ranks."""
    model = Small()
    columns = 5 if rows < 10 else 301
    x, label = random_tensor((1, 2, rows, columns), dtype=torch.float32), torch.ones(3)

    def run(net: Any, rank: int = 0) -> Any:
        given = make(x.clone())
        if grad and given.is_leaf:
            given.requires_grad_()
        with torch.set_grad_enabled(grad):
            result = net(given, label)
            if grad:
                result["image"].square().sum().backward()
        assert result["label"] is label and result["scale"] is net.scale
        return result, given.grad

    right, right_grad = run(model)
    model.zero_grad()
    assert type(right["image"]) is type(make(x)) or right["image"].__class__ is Tensor
    runs = [(world, {"output": "gather"}) for world in (1, 2, 3)] + [(2, {"output": "shard"}), (2, {"output": "rank0"})]
    runs += [(2, {"lazy": False, "splits": 3})]
    for world, options in runs:
        if grad and options.get("output") in {"shard", "rank0"}:
            continue

        def body(rank: int, options: Any = options) -> Any:
            net = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD, fallback="error", **options)
            result, gradient = run(net)
            return distpatch.gather(result), gradient

        for rank, (result, gradient) in enumerate(run_ranks(world, body, keep=True)):
            if options.get("output") == "rank0" and rank > 0:
                assert result["image"] is None
                continue
            for key, wanted in right.items():
                assert facts(result[key]) == facts(wanted), key
                assert_same(result[key].as_subclass(Tensor), wanted.as_subclass(Tensor), 1e-4, key)
            assert_same(gradient, right_grad, 1e-3, "gradient")


@pytest.mark.parametrize(
    "make",
    [CLASSES["with attributes"], CLASSES["MetaTensor"], nn.Parameter],
    ids=["with attributes", "MetaTensor", "parameter"],
)
@pytest.mark.parametrize("columns", [5, 40000])
def test_own_classes_outside_a_model(make: Any, columns: int) -> None:
    """Sharded, adopted, gathered, and through one layer in patches."""
    x = make(random_tensor((1, 2, 7, columns), dtype=torch.float32))
    weight = random_tensor((2, 2, 3, 3), dtype=torch.float32)
    right = F.conv2d(x, weight, padding=1)
    alone = distpatch.patch_conv2d(x, weight, padding=1, splits=3)
    layer = distpatch.PatchConv2d(3, True, None, 2, 2, 3, padding=1)
    assert facts(alone) == facts(right) == facts(layer(x))

    def body(rank: int) -> None:
        for rows in (distpatch.shard(x, dist.group.WORLD), adopted(x, rank)):
            assert type(rows) is PatchTensor and type(rows.local) in {Tensor, nn.Parameter}
            with torch.no_grad():
                result = distpatch.gather({"y": F.conv2d(F.relu(rows), weight, padding=1), "plus": rows + x})
            assert facts(result["y"]) == facts(right)
            assert facts(result["plus"]) == facts(x + x)

    run_ranks(2, body, keep=True)


def adopted(x: Tensor, rank: int) -> PatchTensor:
    local = (x[:, :, :4], x[:, :, 4:])[rank]
    return PatchTensor.from_local(local, dist.group.WORLD)


# What is refused, and what the error says to do.
class Wrapped(Tensor):
    @staticmethod
    def __new__(cls, x: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.empty(SHAPE)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "uint8": (lambda: torch.zeros(SHAPE, dtype=torch.uint8), r"torch.uint8.*x\.float\(\) / 255"),
    "integers": (lambda: torch.zeros(SHAPE, dtype=torch.long), r"torch.int64.*x\.float\(\)"),
    "bool": (lambda: torch.zeros(SHAPE, dtype=torch.bool), r"torch.bool.*x\.float\(\)"),
    "complex": (lambda: torch.zeros(SHAPE, dtype=torch.complex64), r"x\.real, x\.imag"),
    "no batch": (lambda: torch.zeros(SHAPE[1:]), r"\(3, 7, 5\).*x\.unsqueeze\(0\).*\[0\]"),
    "no batch, uint8": (lambda: torch.zeros(SHAPE[1:], dtype=torch.uint8), r"\(x\.float\(\) / 255\)\.unsqueeze\(0\)"),
    "no channels": (lambda: torch.zeros(7, 5), r"x\[None, None\]"),
    "list of sizes": (lambda: [torch.zeros(3, 7, 5), torch.zeros(3, 8, 5)], r"for each as x\.unsqueeze\(0\)"),
    "numpy": (lambda: np.zeros(SHAPE, dtype="float32"), r"torch\.from_numpy\(x\)"),
    "numpy in a dict": (lambda: {"image": np.zeros(SHAPE)}, r"torch\.from_numpy\(x\)"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.zeros(SHAPE), 1.0, 0, torch.quint8), r"x\.dequantize\(\)"),
    "sparse": (lambda: torch.zeros(SHAPE).to_sparse(), r"sparse_coo.*x\.to_dense\(\)"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(3, 7, 5), torch.zeros(3, 6, 5)]), r"x\.unbind\(\)"),
    "a class with its own dispatch": (lambda: Wrapped(torch.zeros(SHAPE)), r"is a Wrapped.*a plain tensor"),
    "fake": (fake, r"FakeTensor has no values.*distpatch\.plan"),
}


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refusals_say_the_way_out(make: Any, text: str) -> None:
    def body(net: Any, rank: int) -> None:
        with pytest.raises(LayoutError, match=text):
            net(make())

    ranked(Net(lambda net, y: y), body, 2)
