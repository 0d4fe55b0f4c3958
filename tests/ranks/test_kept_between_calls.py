"""What a model keeps between calls: plain in its buffers after each call, and everywhere once it is restored."""

from __future__ import annotations

import copy
import io
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from distpatch import DistPatchError, PatchTensor
from distpatch.torch_utils.tree import tensors_in
from tests.support.calls import SHAPE, WORLDS, Frozen, Net, compare, ranked
from tests.support.oracle import random_tensor
from tests.support.threads import rank_outcomes, run_ranks


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
            assert any(isinstance(t, PatchTensor) for t in [*tensors_of(net), *seen.values()])
            assert distpatch.restore_model(net) is net
            assert not any(isinstance(t, PatchTensor) for t in [*tensors_of(net), *seen.values()])
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


def tensors_of(net: nn.Module) -> list[Tensor]:
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
