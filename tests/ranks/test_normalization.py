"""Every normalisation: statistics over all ranks, running ones, affine weights; exact at large means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import distpatch
from distpatch.torch_utils import chunk_sizes
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

X = (3, 8, H, 5)
FEW: dict[str, Any] = {"worlds": (4, 2), "heights": (7, 2)}
MANY = (7, 3, 2)


def norm(groups: int, eps: float = 1e-5) -> Callable[..., Tensor]:
    return lambda x, w=None, b=None: F.group_norm(x, groups, w, b, eps)


def running(channels: int = 8) -> tuple[Tensor, Tensor]:
    return random_tensor((channels,), seed=7), random_tensor((channels,), seed=8).abs()


def batch(momentum: float = 0.1, eps: float = 1e-5) -> Callable[..., Any]:
    """In training: the result and what became of the running statistics."""

    def run(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> tuple[Tensor, ...]:
        mean, var = running(x.shape[1])
        return F.batch_norm(x, mean, var, w, b, training=True, momentum=momentum, eps=eps), mean, var

    return run


def batch_eval(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, *running(x.shape[1]), w, b)


def of_tokens(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As tokens: the gradient of a batch of one then has strides that torch's own kernel reads wrongly, so
    that unsharded it has to be spared them."""

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = norm(x, w, b)
        if out.requires_grad and not isinstance(out, distpatch.PatchTensor):
            out.register_hook(lambda grad: grad.clone(memory_format=torch.contiguous_format))
        return out.flatten(2).transpose(1, 2)

    return run


def instance(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> tuple[Tensor, ...]:
    mean, var = running(x.shape[1])
    return F.instance_norm(x, mean, var, w, b, momentum=0.3), mean, var


def instance_eval(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.instance_norm(x, *running(x.shape[1]), w, b, use_input_stats=False)


def steps(module: nn.Module) -> Callable[[Tensor], Any]:
    """Two training steps and an evaluation of a copy of a module, and its buffers."""

    def run(x: Tensor) -> Any:
        own = copy.deepcopy(module).double()
        first, second = own(x), own(x * 2 + 1)
        third = own.eval()(x)
        return first, second, third, [buffer.clone() for buffer in own.buffers()]

    return run


def parametrised(make: Callable[[nn.Module], nn.Module]) -> Callable[..., Tensor]:
    """A convolution whose weight is computed from other parameters."""
    convolution = make(nn.Conv2d(8, 4, 3, padding=1, dtype=torch.float64)).eval()
    return lambda x, w: copy.deepcopy(convolution)(x) * w


def weight_norm(x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    """Its parameters' gradients too."""
    return F.conv2d(x, torch._weight_norm(v, g, 0), padding=1)


def penalty(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A gradient penalty: the backward pass of the norm is itself differentiated."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return x * w[:, None, None]
        inner = x * 1
        rows = getattr(inner, "local", inner)
        out = norm(inner, w).sin().square().sum()
        (grad,) = torch.autograd.grad(out, rows, create_graph=True)
        if rows is not inner:
            grad = distpatch.PatchTensor(grad, inner.row_layout, inner.region)
        return grad * grad

    return run


def norm_of_frames(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The tokens of all frames of a clip; the rows stay the rows."""
    result = F.group_norm(x.flatten(2), 4, w, b).unflatten(2, x.shape[2:])
    assert not isinstance(x, distpatch.PatchTensor) or x.shape[-2] == 1 or result.row_layout == x.row_layout
    return result


CASES = {
    "group_norm of four groups": case(norm(4), X, (8,), (8,), p2p=1),
    "no weight": case(norm(4), X),
    "weight without bias": case(norm(2), X, (8,)),
    "one group": case(norm(1), X, (8,), (8,)),
    "a channel a group": case(norm(8, 1e-3), X, (8,), (8,)),
    "batch 1": case(norm(4), (1, 8, H, 5), (8,), (8,)),
    "channels_last": case(norm(4), X, (8,), (8,), channels_last=True),
    "channels_last batch 1": case(norm(4), (1, 8, H, 5), (8,), (8,), channels_last=True),
    "width": case(norm(4), (3, 8, 5, H), (8,), (8,), dim=-1),
    "tokens": case(norm(4), (2, 8, H), (8,), (8,), dim=-1),
    "3d": case(norm(4), (2, 8, 3, H, 4), (8,), (8,)),
    "batch sharded": case(norm(4), (H, 8, 3, 5), (8,), (8,), dim=0, p2p=0),
    "module": case(lambda x: torch.nn.GroupNorm(4, 8, dtype=torch.float64)(x), X),
    "norm, silu, conv": case(
        lambda x, g, b, w: F.conv2d(F.silu(F.group_norm(x, 2, g, b)), w, padding=1), X, (8,), (8,), (4, 8, 3, 3)
    ),
    "layer_norm of the width": case(lambda x, w, b: F.layer_norm(x, (5,), w, b), X, (5,), (5,), p2p=0),
    "layer_norm of tokens": case(lambda x, w: F.layer_norm(x, (6,), w), (2, H, 6), (6,), p2p=0),
    "rms_norm of tokens": case(lambda x, w: F.rms_norm(x, (6,), w), (2, H, 6), (6,), p2p=0),
    "layer_norm over the rows": case(lambda x: F.layer_norm(x, x.shape[-2:]), X, heights=(7,)),
    "normalize channels": case(lambda x: F.normalize(x, dim=1), X, p2p=0),
    "softmax channels": case(lambda x: x.softmax(1) + torch.log_softmax(x, dim=-1), X, p2p=0),
    "softmax over the rows": case(lambda x: x.softmax(-2), X),
    "group_norm of frames": case(norm_of_frames, (2, 8, 3, H, 5), (8,), (8,), p2p=0),
    "group_norm of torch": case(lambda x, w: torch.group_norm(x, 2, w), X, (8,), **FEW),
    "group_norm, weights alone": case(lambda x, w, b: F.group_norm(x.detach(), 4, w, b), X, (8,), (8,)),
    "group_norm of one pixel": case(lambda x: F.group_norm(x, 2), (2, 4, H, 1)),
    "group_norm, fp16 and fp32 weights": case(
        lambda x, w, b: F.group_norm(x.half(), 4, w.float(), b.float()), X, (8,), (8,), tolerance=2e-2, **FEW
    ),
    "group_norm, bf16 and fp32 weights": case(
        lambda x, w, b: F.group_norm(x.bfloat16(), 4, w.float(), b.float()), X, (8,), (8,), tolerance=1e-1, **FEW
    ),
    "group_norm, frozen weights": case(lambda x, w, b: F.group_norm(x, 4, w.detach(), b), X, (8,), (8,), **FEW),
    "group_norm twice": case(lambda x, w: F.group_norm(F.group_norm(x, 2, w) * x, 4), X, (8,), **FEW),
    "group_norm, channels_last": case(lambda x, w: F.group_norm(x, 4, w), X, (8,), channels_last=True, **FEW),
    "group_norm, gradient penalty": case(penalty(lambda x, w: F.group_norm(x, 4, w)), X, (8,)),
    "batch_norm": case(batch(), X, (8,), (8,), p2p=0),
    "batch_norm without weights": case(batch(0.5, 1e-3), X),
    "batch_norm, weight alone": case(lambda x, w: F.batch_norm(x, None, None, w, training=True), X, (8,), **FEW),
    "batch_norm width": case(batch(), (2, 8, 5, H), (8,), (8,), dim=-1, **FEW),
    "batch_norm 3d": case(batch(), (2, 8, 3, H, 4), (8,), (8,), **FEW),
    "batch_norm of tokens": case(batch(), (2, 8, H), (8,), (8,), dim=-1),
    "batch_norm, batch sharded": case(batch(), (H, 8, 3), (8,), (8,), dim=0),
    "batch_norm of vectors": case(batch(), (H, 8), (8,), (8,), dim=0, heights=MANY),
    "batch_norm, channels_last": case(batch(), X, (8,), (8,), channels_last=True, **FEW),
    "batch_norm of torch": case(
        lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False), X, (8,), (8,), **FEW
    ),
    "batch_norm, gradient penalty": case(penalty(lambda x, w: F.batch_norm(x, None, None, w, training=True)), X, (8,)),
    "batch_norm, evaluation": case(batch_eval, X, (8,), (8,), p2p=0),
    "batch_norm, evaluation without weights": case(batch_eval, X, **FEW),
    "batch_norm, evaluation, batch sharded": case(batch_eval, (H, 8, 3), (8,), (8,), dim=0, **FEW),
    "batch_norm, evaluation, tokens of it": case(of_tokens(batch_eval), (1, 8, H, 5), (8,), (8,)),
    "batch_norm, evaluation, then in place": case(lambda x, w, b: batch_eval(x, w, b).relu_(), X, (8,), (8,), **FEW),
    "batch_norm, tokens of it": case(of_tokens(lambda x, w, b: batch()(x, w, b)[0]), (1, 8, H, 5), (8,), (8,)),
    "batch_norm, channels sharded": case(batch(), (3, H, 5), (H,), (H,), dim=1, heights=(7,)),
    "BatchNorm2d": case(steps(nn.BatchNorm2d(8)), X, heights=(7, 2)),
    "BatchNorm2d, average of all": case(steps(nn.BatchNorm2d(8, momentum=None)), X, **FEW),
    "BatchNorm2d, no running statistics": case(steps(nn.BatchNorm2d(8, track_running_stats=False, affine=False)), X, **FEW),
    "BatchNorm3d": case(steps(nn.BatchNorm3d(4)), (2, 4, 2, H, 3), **FEW),
    "instance_norm": case(instance, X, (8,), (8,), p2p=1),
    "instance_norm alone": case(lambda x: F.instance_norm(x), X),
    "instance_norm width": case(instance, (2, 8, 5, H), (8,), (8,), dim=-1, **FEW),
    "instance_norm, evaluation": case(instance_eval, X, (8,), (8,), p2p=0),
    "instance_norm, evaluation, tokens of it": case(of_tokens(instance_eval), (1, 8, H, 5), (8,), (8,)),
    "instance_norm, tokens of it": case(of_tokens(lambda x, w, b: instance(x, w, b)[0]), (1, 8, H, 5), (8,), (8,)),
    "instance_norm of torch": case(
        lambda x, w: torch.instance_norm(x, w, None, None, None, True, 0.1, 1e-5, False), X, (8,), **FEW
    ),
    "instance_norm, batch sharded": case(lambda x, w: F.instance_norm(x, weight=w), (H, 8, 3), (8,), dim=0, **FEW),
    "instance_norm, channels sharded": case(lambda x: F.instance_norm(x), (2, H, 5), dim=1, heights=(7,)),
    "InstanceNorm2d": case(steps(nn.InstanceNorm2d(8)), X, **FEW),
    "InstanceNorm2d, tracked": case(steps(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), X, **FEW),
    "InstanceNorm2d, unbatched": case(steps(nn.InstanceNorm2d(8)), (8, H, 5), **FEW),
    "layer_norm of pixels": case(lambda x, w, b: F.layer_norm(x, x.shape[-2:], w, b), X, (H, 5), (H, 5), heights=(7, 3)),
    "layer_norm of images": case(lambda x, w, b: F.layer_norm(x, x.shape[1:], w, b), X, (8, H, 5), (8, H, 5), heights=(7,)),
    "layer_norm of all": case(lambda x: F.layer_norm(x, x.shape), X),
    "layer_norm of rows": case(lambda x, w: F.layer_norm(x, x.shape[-1:], w), (2, 3, H), (H,), dim=-1, heights=(7, 3)),
    "layer_norm of rows, bf16": case(
        lambda x, w: F.layer_norm(x.bfloat16(), x.shape[-2:], w.bfloat16()), X, (H, 5), tolerance=1e-1, **FEW
    ),
    "layer_norm of channels last": case(lambda x, w, b: F.layer_norm(x.permute(0, 2, 3, 1), (8,), w, b), X, (8,), (8,), p2p=0),
    "LayerNorm, bias alone": case(lambda x, b: F.layer_norm(x, (5,), None, b), X, (5,), **FEW),
    "rms_norm of pixels": case(lambda x, w: F.rms_norm(x, x.shape[-2:], w), X, (H, 5), heights=(7, 3)),
    "rms_norm of images": case(lambda x: F.rms_norm(x, x.shape[1:], eps=1e-3), X),
    "rms_norm of columns": case(lambda x, w: F.rms_norm(x, (5,), w), X, (5,), p2p=0),
    "rms_norm of rows, bf16": case(lambda x: F.rms_norm(x.bfloat16() * 1e-3, x.shape[-2:]), X, tolerance=1e-1, **FEW),
    "local_response_norm": case(lambda x: F.local_response_norm(x, 3, alpha=0.1, beta=0.5, k=2.0), X, p2p=0),
    "local_response_norm of tokens": case(lambda x: F.local_response_norm(x, 2), (2, 8, H), dim=-1, **FEW),
    "local_response_norm, channels sharded": case(lambda x: F.local_response_norm(x, 3), (2, H, 5), dim=1, heights=(7,)),
    "weight_norm": case(weight_norm, X, (4, 1, 1, 1), (4, 8, 3, 3)),
    "weight_norm, parametrised": case(parametrised(parametrizations.weight_norm), X, (4, 1, 1), **FEW),
    "spectral_norm, parametrised": case(parametrised(parametrizations.spectral_norm), X, (4, 1, 1), **FEW),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_normalization(case: Callable[[], None]) -> None:
    case()


READ_ONCE = [
    "group_norm of four groups",
    "no weight",
    "weight without bias",
    "one group",
    "a channel a group",
    "batch 1",
    "channels_last",
    "channels_last batch 1",
    "width",
    "tokens",
    "3d",
    "batch sharded",
    "module",
    "softmax channels",
    "softmax over the rows",
]


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics as devices without a large cache take them."""
    monkeypatch.setitem(chunk_sizes.BY_KIND, "cpu", replace(chunk_sizes.BY_KIND["cpu"], reads_twice=False))


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize("name", READ_ONCE)
def test_normalization_in_one_reading(name: str) -> None:
    CASES[name]()


@pytest.mark.parametrize("readings", [1, 2])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "autograd"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [1, 2])
def test_exact_where_the_mean_is_large(
    batch: int, channels_last: bool, grad: bool, readings: int, request: pytest.FixtureRequest
) -> None:
    """Where mean / std is 100, E[x²] - E[x]² loses 1e-2 in fp32; torch's own kernel about 1e-5."""
    if readings == 1:
        request.getfixturevalue("read_once")
    x = 100 + random_tensor((batch, 32, 24, 16), dtype=torch.float32)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    right = F.group_norm(x.double(), 8)
    own_error = (F.group_norm(x, 8) - right).abs().max()

    def body(rank: int) -> Tensor:
        with torch.set_grad_enabled(grad):
            sharded = distpatch.shard(x.clone().requires_grad_(grad), dist.group.WORLD)
            return distpatch.gather(F.group_norm(sharded, 8)).detach()

    for result in run_ranks(3, body):
        assert (result - right).abs().max() <= max(1.5 * own_error, 5e-6)


@pytest.mark.parametrize("readings", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_statistics(dtype: torch.dtype, readings: int, request: pytest.FixtureRequest) -> None:
    """Statistics are kept in fp32: a constant offset of 20 must not eat the variance."""
    if readings == 1:
        request.getfixturevalue("read_once")
    x = (20 + random_tensor((1, 16, 40, 40), dtype=torch.float32)).to(dtype)
    right = F.group_norm(x.double(), 4)
    own_error = (F.group_norm(x, 4) - right).abs().mean()

    def body(rank: int) -> Tensor:
        with torch.no_grad():
            return distpatch.gather(F.group_norm(distpatch.shard(x, dist.group.WORLD), 4))

    for result in run_ranks(3, body):
        assert result.dtype == dtype
        assert (result - right).abs().mean() <= 1.2 * own_error


def test_one_collective() -> None:
    """Two numbers a channel group to each rank, of an image its last row too; and no more."""
    x, tokens = random_tensor((2, 8, 6, 5)), random_tensor((2, 8, 6))

    def body(rank: int) -> distpatch.Trace:
        with torch.no_grad(), distpatch.trace() as t:
            F.group_norm(distpatch.shard(tokens, dist.group.WORLD, dim=2), 4)
            F.group_norm(distpatch.shard(x, dist.group.WORLD), 4)
        return t

    moments, row = 2 * 2 * 4 * 8, 2 * 8 * 5 * 8  # (mean, deviation), batch, groups; batch, channels, columns; fp64
    for t in run_ranks(2, body):
        of_tokens, of_image = t.records
        assert (of_tokens.kind, of_tokens.op, of_tokens.sent_bytes) == ("all_gather", "group_norm", moments)
        assert (of_image.kind, of_image.op, of_image.sent_bytes) == ("p2p", "group_norm", moments + row)


def in_blocks(x: Tensor) -> Tensor:
    """(2, 2, 2, 1, 112) of (2, 8, 8, 7): channels and rows in one dim, of which a rank has some in each block."""
    return x.view(2, 2, 2, 1, 112)


OF_BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "group": lambda x: F.group_norm(in_blocks(x), 2, x[0, 0, 0, :2], x[0, 0, 0, 2:4]),
    "group, of 4 dims": lambda x: F.group_norm(x.view(2, 2, 1, 224), 2),
    "group, then a convolution": lambda x: F.conv3d(F.group_norm(in_blocks(x), 2), x[:2, :2, :1, None, :3]),
    "instance": lambda x: F.instance_norm(in_blocks(x)),
    "batch": lambda x: F.batch_norm(in_blocks(x), None, None, training=True),
    "layer": lambda x: F.layer_norm(in_blocks(x), (112,)),
    "RMS": lambda x: F.rms_norm(in_blocks(x), (112,)),
    "local response": lambda x: F.local_response_norm(in_blocks(x), 2),
}


@pytest.mark.parametrize("name", OF_BLOCKS)
def test_rows_in_blocks_bring_none_along(name: str) -> None:
    """Without gradients a norm's moments travel with an image's edge rows; rows in blocks have none."""
    x, norm = random_tensor((2, 8, 8, 7)), OF_BLOCKS[name]
    right = norm(x)

    def body(rank: int) -> None:
        for bounds in ((0, 2, 4, 8), (0, 0, 5, 8), (0, 8, 8, 8)):
            with torch.no_grad():
                found = norm(distpatch.shard(x, dist.group.WORLD, bounds=bounds))
            torch.testing.assert_close(distpatch.gather(found), right, rtol=1e-10, atol=1e-10)

    run_ranks(3, body)
