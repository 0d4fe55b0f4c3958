"""Every normalisation: statistics over all ranks, running ones, affine weights; exact at large means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import distpatch
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

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
    "instance_norm": case(instance, X, (8,), (8,), p2p=0),
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
def test_norms(case: Callable[[], None]) -> None:
    case()


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm": lambda x: F.group_norm(x, 16),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "instance_norm": F.instance_norm,
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-2:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-2:]),
    "var": lambda x: torch.var(x, dim=(2, 3)),
    "std": torch.std,
    "var_mean": lambda x: torch.stack(torch.var_mean(x, dim=(0, 2, 3))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [100, 1000])
def test_no_less_exact_than_torch_at_large_means(mean: int, dtype: torch.dtype) -> None:
    """Values of mean 100 and 1000 and deviation 1: no more error than torch's own on one device."""
    inputs = [
        (mean + random_tensor(shape, dtype=torch.float32)).to(dtype) for shape in ((4, 32, 24, 16), (1, 32, 96, 64))
    ]

    def body(rank: int) -> list[Tensor]:
        outs = []
        for x in inputs:
            for fn in STATISTICS.values():
                for grad in (False, True):
                    leaf = distpatch.shard(x.clone().requires_grad_(grad), dist.group.WORLD, dim=2)
                    outs.append(distpatch.gather(fn(leaf)).detach())
        return outs

    for outs in run_ranks(3, body):
        results = iter(outs)
        for x in inputs:
            for name, fn in STATISTICS.items():
                right = fn(x.double())
                own = (fn(x).double() - right).abs()
                for _ in range(2):
                    error = (next(results).double() - right).abs()
                    assert error.mean() <= 1.1 * own.mean() + 1e-8, (name, x.shape, error.mean(), own.mean())
                    assert error.max() <= 1.5 * own.max() + 1e-8, (name, x.shape, error.max(), own.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_under_autocast(dtype: torch.dtype) -> None:
    """A result has the dtype that it has on one device."""
    x, w = random_tensor((2, 8, 6, 4), dtype=torch.float32).to(dtype), torch.ones(8)
    fns: dict[str, Callable[[Any], Any]] = {
        "group_norm": lambda x: F.group_norm(x, 4, w, w),
        "batch_norm": lambda x: F.batch_norm(x, None, None, w, w, training=True),
        "instance_norm": lambda x: F.instance_norm(x, weight=w),
        "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
        "rms_norm": lambda x: F.rms_norm(x, x.shape[1:]),
        "softmax": lambda x: x.softmax(2),
        "log_softmax": lambda x: F.log_softmax(x, dim=-1),
        "sum": torch.sum,
        "mean": lambda x: x.mean((2, 3)),
        "prod": lambda x: x.prod(2),
        "norm": torch.linalg.vector_norm,
        "logsumexp": lambda x: x.logsumexp((2, 3)),
        "var": torch.var,
        "cumsum": lambda x: x.cumsum(2),
        "cumprod": lambda x: x.cumprod(2),
        "matmul": lambda x: x.mT @ x,
        "linear": lambda x: F.linear(x, torch.ones(5, 4)),
        "einsum": lambda x: torch.einsum("bchw,bchv->bcwv", x, x),
        "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
        "attention of plain queries": lambda x: F.scaled_dot_product_attention(distpatch.gather(x), x, x),
        "normalize": lambda x: F.normalize(x, dim=2),
        "amax": lambda x: x.amax(2),
        "cosine_similarity": lambda x: F.cosine_similarity(x, x, dim=2),
        "baddbmm": lambda x: torch.baddbmm(torch.ones(8, 6, 6), x[0], x[0].mT),
        "linalg.norm": lambda x: torch.linalg.norm(x, 1, (2, 3)),
        "vector_norm in fp64": lambda x: torch.linalg.vector_norm(x, dtype=torch.float64),
    }
    with torch.autocast("cpu", torch.bfloat16):
        right = {name: fn(x) for name, fn in fns.items()}

    def body(rank: int) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return {name: distpatch.gather(fn(distpatch.shard(x, dist.group.WORLD))) for name, fn in fns.items()}

    for name, value in run_ranks(2, body)[1].items():
        assert value.dtype == right[name].dtype, name
        torch.testing.assert_close(value, right[name], rtol=0.03, atol=0.05, msg=lambda m, n=name: f"{n}: {m}")
