"""Traps of tensors that wrap another: functions, in-place writes, hooks and messages that go around the wrapper."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import einops
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distpatch
from distpatch import PatchTensor, UnsupportedOpError
from distpatch.profiling.live_memory import LivePeak
from tests.support.oracle import H, assert_same, case, random_tensor
from tests.support.threads import run_ranks
from tests.support.zoo.models import on_ranks

X = (2, 3, H, 5)
W3 = (4, 3, 3, 3)


def controlled(x: Tensor) -> Tensor:
    """Control flow and numbers from values, which on local rows are another rank's business."""
    if x.mean() > 0.01:
        x = x * 2
    return x / float(x.detach().abs().sum()) + x.max().item() - float(x.detach().min())


def zeros_of_its_shape(x: Tensor) -> Tensor:
    """A buffer of ``x.shape``: replicated, and as tall as the picture."""
    zeros = x.new_zeros(x.shape)
    zeros[:, :, :1] = 1
    return zeros + x + torch.ones(x.shape, dtype=x.dtype)


TRAPS = {
    "new_zeros of the global shape": case(zeros_of_its_shape, X),
    "plain noise of the global shape": case(lambda x: x + random_tensor(tuple(x.shape), seed=9), X),
    "view by sizes of the shape": case(lambda x: x.view(x.shape[0], -1, x.shape[2] * x.shape[3]), X),
    "einops by sizes of the shape": case(
        lambda x: einops.rearrange(x, "b c (n h) w -> b n (h w c)", n=x.shape[2]), X
    ),
    "interpolate to a size": case(lambda x: F.interpolate(x, size=(11, 7)), X),
    "interpolate to the size of another": case(lambda x, y: y + F.interpolate(x * F.interpolate(y, size=x.shape[-2:]), size=y.shape[-2:]), X, (2, 3, 11, 4)),
    "pad": case(lambda x: F.pad(x, (1, 0, 2, 1)), X),
    "slices of rows": case(lambda x: x[:, :, 1:] - x[:, :, :-1], X, heights=(7, 3)),
    "slices of rows with steps, from behind": case(lambda x: x[:, :, ::2].sum() * x[:, :, -2:], X, heights=(7, 3)),
    "max of everything": case(lambda x: x / x.max(), X),
    "if the mean is positive": case(controlled, X),
    "norm over the flattened tokens": case(
        lambda x: F.group_norm(x.flatten(2), 3).transpose(1, 2).softmax(1), X, heights=(7, 3)
    ),
    "reentrant checkpoint": case(lambda x, w: checkpoint(lambda t: F.conv2d(t, w, padding=1).tanh(), x * 1, use_reentrant=True), X, W3, heights=(7,)),
    "checkpoint": case(lambda x, w: checkpoint(lambda t: F.conv2d(t, w, padding=1).tanh(), x, use_reentrant=False), X, W3),
    "deepcopy": case(lambda x: copy.deepcopy(x.detach()) * x, X),
    "the rank above is also the rank below": case(
        lambda x, w: F.conv2d(F.pad(x, (0, 0, 1, 1), mode="circular"), w[..., :1]), X, W3, worlds=(2,), heights=(7, 2)
    ),
    "no message to send": case(lambda x, w: F.conv2d(x, w[..., :1, :1]), X, W3),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("case", TRAPS.values(), ids=TRAPS)
def test_traps_of_a_wrapper(case: Callable[[], None]) -> None:
    case()


WITHOUT_MEMORY: dict[str, Callable[[PatchTensor], object]] = {
    "numpy": lambda x: x.numpy(),
    "data_ptr": lambda x: x.data_ptr(),
    "safetensors": lambda x: safetensors.torch.save({"x": x}),
    "pickle": lambda x: pickle.dumps(x),
    "vmap": lambda x: torch.vmap(lambda t: t * 2)(x),
    "tolist": lambda x: x.tolist(),
}


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_traps_that_are_refused(name: str) -> None:
    def body(rank: int) -> None:
        with pytest.raises(UnsupportedOpError, match=r"distpatch\.gather"):
            WITHOUT_MEMORY[name](distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD))

    run_ranks(2, body)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_sees_all_rows() -> None:
    """A scripted function runs below ``__torch_function__``, where a rank's rows could be taken for the image."""
    scripted, x = torch.jit.script(twice), random_tensor((1, 2, 5, 3))

    def body(rank: int) -> Tensor:
        return distpatch.gather(scripted(distpatch.shard(x, dist.group.WORLD)))

    for found in run_ranks(2, body):
        assert torch.equal(found, twice(x))


def twice(x: Tensor) -> Tensor:
    return x.max() + x * 2


def test_in_place_gives_the_same_wrapper() -> None:  # more: test_tensor_surface.py
    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD)
        local = x.local = x.local.clone()
        assert x.mul_(3) is x and F.relu(x, inplace=True) is x and x.local is local

    run_ranks(2, body)


def test_full_backward_hooks_see_whole_gradients() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1).double()
    x = random_tensor((2, 3, 7, 5))

    def seen(model: nn.Module, _: int = 0) -> list[Tensor]:
        grads: list[Tensor] = []
        model[0].register_full_backward_hook(lambda _, given, made: grads.extend((given[0], made[0])))  # type: ignore[index]
        model(x.clone().requires_grad_()).square().sum().backward()
        return [distpatch.gather(grad) for grad in grads]

    model = nn.Sequential(layer)
    wanted = seen(copy.deepcopy(model))
    for result in run_ranks(2, on_ranks(model, seen)):
        for value, right in zip(result, wanted, strict=True):
            assert_same(value, right, 1e-10, "gradient")


def test_messages_do_not_meet_those_of_the_user() -> None:
    """P2P between collectives on the user's communicator swapped rows; a group [2, 0] has other ranks than the world."""
    x, w = random_tensor((1, 3, 9, 4)), random_tensor((3, 3, 3, 3))

    def body(rank: int) -> None:
        group = dist.new_group([0, 2], use_local_synchronization=True) if rank != 1 else None
        if group is None:
            return
        y = distpatch.shard(x, group)
        for step in range(3):
            number = torch.tensor([float(step)])
            dist.all_reduce(number, group=group)
            y = F.conv2d(y, w, padding=1)
            assert number.item() == 2 * step
        wanted = F.conv2d(F.conv2d(F.conv2d(x, w, padding=1), w, padding=1), w, padding=1)
        assert_same(distpatch.gather(y), wanted, 1e-10, "picture")

    run_ranks(3, body)


def test_the_whole_causal_mask_is_never_made() -> None:
    """A dense mask of Hunyuan's took 49.6 GiB: here a rank makes that of a few of its queries at a time."""
    q = random_tensor((1, 2, 64, 8))

    def body(rank: int) -> int:
        x = distpatch.shard(q, dist.group.WORLD)
        with torch.no_grad(), LivePeak() as live:
            F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return live.peak_bytes

    from distpatch.rules.linalg import attention

    wide, attention.SCORE_BYTES = attention.SCORE_BYTES, 1 << 13
    try:
        assert max(run_ranks(2, body)) < 2 * 64 * 64 * 8  # one head's scores in fp64
    finally:
        attention.SCORE_BYTES = wide
