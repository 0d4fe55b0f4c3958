"""Every normalisation: statistics over all ranks, running ones, affine weights; exact at large means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import distpatch
from tests.oracle import H, case, random_tensor

X = (3, 8, H, 5)
FEW: dict[str, Any] = {"worlds": (4, 2), "heights": (7, 2)}
MANY = (7, 3, 2)


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
            grad = distpatch.PatchTensor(grad, inner.rows, inner.region)
        return grad * grad

    return run


CASES = {
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
    "batch_norm, channels sharded": case(batch(), (3, H, 5), (H,), (H,), dim=1, heights=(7,), fallback="batch_norm"),
    "BatchNorm2d": case(steps(nn.BatchNorm2d(8)), X, heights=(7, 2)),
    "BatchNorm2d, average of all": case(steps(nn.BatchNorm2d(8, momentum=None)), X, **FEW),
    "BatchNorm2d, no running statistics": case(steps(nn.BatchNorm2d(8, track_running_stats=False, affine=False)), X, **FEW),
    "BatchNorm3d": case(steps(nn.BatchNorm3d(4)), (2, 4, 2, H, 3), **FEW),
    "instance_norm": case(instance, X, (8,), (8,), p2p=0),
    "instance_norm alone": case(lambda x: F.instance_norm(x), X),
    "instance_norm width": case(instance, (2, 8, 5, H), (8,), (8,), dim=-1, **FEW),
    "instance_norm, evaluation": case(instance_eval, X, (8,), (8,), p2p=0),
    "instance_norm of torch": case(
        lambda x, w: torch.instance_norm(x, w, None, None, None, True, 0.1, 1e-5, False), X, (8,), **FEW
    ),
    "instance_norm, batch sharded": case(lambda x, w: F.instance_norm(x, weight=w), (H, 8, 3), (8,), dim=0, **FEW),
    "instance_norm, channels sharded": case(lambda x: F.instance_norm(x), (2, H, 5), dim=1, heights=(7,), fallback="instance_norm"),
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
    "local_response_norm, channels sharded": case(lambda x: F.local_response_norm(x, 3), (2, H, 5), dim=1, heights=(7,), fallback="local_response_norm"),
    "weight_norm": case(weight_norm, X, (4, 1, 1, 1), (4, 8, 3, 3)),
    "weight_norm, parametrised": case(parametrised(parametrizations.weight_norm), X, (4, 1, 1), **FEW),
    "spectral_norm, parametrised": case(parametrised(parametrizations.spectral_norm), X, (4, 1, 1), **FEW),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_norms(case: Callable[[], None]) -> None:
    case()
