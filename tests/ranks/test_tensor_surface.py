"""What else is done with a tensor: hooks, gradients by hand, checkpoints, copies, numbers, dtypes."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import einops
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import distpatch
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

X = (2, 3, H, 5)
WEIGHT = (3, 3, 3, 3)


class Swish(torch.autograd.Function):
    """A memory-saving activation, as efficient nets have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class Scale(torch.autograd.Function):
    """Two inputs, one of them replicated; the newer style, with defaults."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, by: float = 2.0) -> tuple[Tensor, Tensor]:
        return x * w * by, x.sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, w, by = inputs
        ctx.save_for_backward(x, w)
        ctx.by = by

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        return grad * w * ctx.by + grad_sum, (grad * x).sum((0, 2, 3)).view(w.shape) * ctx.by, None


class Clip(torch.autograd.Function):
    """Gradient clipping: the input as it is, and a smaller gradient of another layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.flip(2).clamp(-0.1, 0.1).flip(2)


def block(x: Tensor, w: Tensor) -> Tensor:
    y = F.conv2d(x, w, padding=1)
    return F.group_norm(torch.tanh(y), 1) + x


def checkpointed(reentrant: bool) -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor) -> Tensor:
        y = checkpoint(block, x * 1, w, use_reentrant=reentrant)
        y = checkpoint(lambda t: block(t, w) * t.mean(), y, use_reentrant=reentrant)
        return F.conv2d(y, w)

    return run


def hooked(x: Tensor) -> tuple[Tensor, Tensor]:
    """A hook that sees the gradient, and one that changes it."""
    seen: list[Tensor] = []
    y = x * 2
    if y.requires_grad:
        y.register_hook(lambda grad: seen.append(grad))
        y.register_hook(lambda grad: grad * 3 + grad.mean())
        y.retain_grad()
    z = (y.square()).sum()
    if not z.requires_grad:
        return z, z
    z.backward()
    assert y.grad is not None and y.grad.shape == y.shape == seen[0].shape
    return y.grad.detach() - seen[0].detach(), z.detach()


def grad_by_hand(x: Tensor, w: Tensor) -> Any:
    """A gradient penalty: a gradient of a gradient."""
    if not torch.is_grad_enabled():
        return x
    y = x * 1
    out = F.conv2d(y, w, padding=1).tanh()
    (gx, gw) = torch.autograd.grad(out.sum(), (y, w), create_graph=True)
    (again,) = torch.autograd.grad(out, y, torch.ones_like(out), create_graph=True)
    return gx.square().sum() + gw.square().mean() + (again * gx).mean((2, 3)), gx


def backward_of_many(x: Tensor, w: Tensor) -> Any:
    if not torch.is_grad_enabled():
        return x.detach()
    y = x.detach().requires_grad_()
    outputs = [y * 2, F.conv2d(y, w.detach(), padding=1), y.sum()]
    torch.autograd.backward(outputs, [torch.ones(x.shape).double(), outputs[1].detach(), None])
    return y.grad


def accumulated(x: Tensor) -> Any:
    """``.grad`` of a leaf: set, added to, cleared, scaled, as optimisers do."""
    with torch.enable_grad():
        y = x.detach().clone().requires_grad_()
        fired = []
        y.register_post_accumulate_grad_hook(lambda t: fired.append(t.grad.shape))
        (y * 3).sum().backward()
        (y * y).sum().backward()
    assert fired == [x.shape] * 2
    y.grad.mul_(0.5)
    y.data = y.data - 0.1 * y.grad
    first = y.grad.clone()
    y.grad = torch.zeros_like(y)
    y.grad = None
    assert y.grad is None
    y.requires_grad = False
    return y.data.add_(1), first


def module_with_hooks(x: Tensor, w: Tensor) -> Any:
    """Full backward hooks of a module see the gradients of the whole tensors, and may change them."""
    seen: dict[str, Tensor] = {}
    module = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
    module.weight.data.copy_(w.detach())

    def scale(_: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        seen.update({"in": grad_input[0].detach(), "out": grad_output[0].detach()})
        return (grad_input[0] * 2,)

    module.register_full_backward_hook(scale)
    module.register_full_backward_pre_hook(lambda _, grad_output: (grad_output[0] * 3,))
    module.register_forward_hook(lambda _, args, output: output * 0.5)
    module.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    y = x * 1
    out = module(y)
    if torch.is_grad_enabled():
        (gx,) = torch.autograd.grad(out.square().sum(), y, retain_graph=True)
        return out, gx, seen["in"], seen["out"]
    return out


def out_forms(x: Tensor, y: Tensor) -> Any:
    """``out=`` that is sharded, of another layout than the operands, and plain."""
    x, y = x.detach(), y.detach()
    one, other, plain = torch.empty_like(y), torch.zeros_like(x), torch.zeros(x.shape).double()
    assert torch.add(x, y, out=one) is one
    torch.mul(y, 2, out=other)
    torch.exp(x, out=plain)
    return one, other, plain


def in_place_of_all_kinds(x: Tensor, y: Tensor) -> Any:
    a = x.float()
    a += y
    a.mul_(y[:, :1]).add_(torch.ones(5).double()).copy_(y).clamp_(-1, 1)
    b = (x > 0) & (y > 0)
    b |= x < -1
    b.logical_not_()
    c = x.detach().to(torch.int64)
    c += 2
    c <<= 1
    d = x.detach().clone()
    d.fill_(3).zero_().add_(x.detach()).detach_()
    return a.double(), b, c, d, F.elu(x * 1, inplace=True)


def numbers(x: Tensor) -> Tensor:
    """Control flow and arithmetic with numbers that come from sharded values."""
    values = x.detach()
    total = float(values.sum())
    if x.mean() > 0 and bool((x > -100).all()):
        total += values.max().item()
    one = values[:1, :1, :1, :1]
    assert one.item() == float(one) == one.sum().item()
    assert bool(one == one.item()) and int(one * 10) == int(one.item() * 10)
    assert math.isclose(values.abs().max().tolist(), max(values.max().item(), -values.min().item()))
    assert one.item() in values and 1e9 not in values
    return x * total + len(x) + x.numel() + x.dim() + x.size(2) + x.shape[-1] + x.stride()[0] * 0


def compared(x: Tensor, y: Tensor) -> Tensor:
    assert torch.equal(x, x.clone()) and not torch.equal(x, y) and not torch.equal(x, y[:, :1])
    assert torch.allclose(x, x + 1e-12) and not x.allclose(y)
    assert torch.isclose(x, x).all() and not (x != x.clone()).any()
    assert torch.is_tensor(x) and torch.is_floating_point(x) and not torch.is_complex(x)
    assert torch.is_nonzero(x[:1, :1, :1, :1] * 0 + 1)
    assert (x == None) is False  # noqa: E711
    return (x == y).to(x.dtype) + (x >= y) + x.eq(x) + torch.maximum(x, y)


def converted(x: Tensor) -> Any:
    half = x.to(torch.float16).to(x.device, non_blocking=True)
    assert half.dtype == torch.float16 and half.element_size() == 2 and half.cpu() is half
    assert x.double() is x and x.to(x) is x and x.type(torch.float32).dtype == torch.float32
    last = x.to(memory_format=torch.channels_last)
    kept = last.contiguous(memory_format=torch.channels_last)
    return half.double(), x.bfloat16().float(), last * 1, kept, x.half().type_as(x), x.cfloat().real


CASES = {
    "custom function": case(lambda x: Swish.apply(x * 2) + x, X),
    "custom function twice": case(lambda x, w: Swish.apply(F.conv2d(Swish.apply(x), w, padding=1)), X, WEIGHT),
    "custom function of two": case(lambda x, w: Scale.apply(x, w, 3.0), X, (3, 1, 1)),
    "custom function, defaults": case(lambda x, w: Scale.apply(x, w), X, (3, 1, 1)),
    "custom function of a view": case(lambda x: Clip.apply(x * 1) * x, X),
    "custom function of a row": case(lambda x: Swish.apply(x[:, :, 0]), X),
    "checkpoint, reentrant": case(checkpointed(True), X, WEIGHT, heights=(7, 3)),
    "checkpoint": case(checkpointed(False), X, WEIGHT, heights=(7, 3)),
    "hooks": case(hooked, X),
    "gradient penalty": case(grad_by_hand, X, WEIGHT),
    "backward of many": case(backward_of_many, X, WEIGHT),
    "grad of a leaf": case(accumulated, X),
    "module hooks": case(module_with_hooks, X, WEIGHT),
    "out=": case(out_forms, X, X, sharded=2),
    "in place": case(in_place_of_all_kinds, X, X, sharded=2, tolerance=1e-6),
    "in place, plain": case(in_place_of_all_kinds, X, X, tolerance=1e-6),
    "numbers": case(numbers, X),
    "comparisons": case(compared, X, X, sharded=2),
    "comparisons, plain": case(compared, X, X),
    "dtypes and formats": case(converted, X, tolerance=1e-2),
    "no gradient, then some": case(lambda x: x.detach() * x + torch.no_grad()(lambda: x * 2)(), X),
    "inference": case(lambda x, w: torch.inference_mode()(lambda: block(x.detach(), w).relu_()[:, :, 0])().clone(), X, WEIGHT),
    "iteration": case(lambda x: sum(t * i for i, t in enumerate(x)) + torch.stack(list(x)).sum(0), X),
    "einops einsum": case(lambda x, w: einops.einsum(x, w, "b c h w, d c -> b d h w"), X, (4, 3)),
    "deepcopy": case(lambda x: copy.deepcopy(x.detach()) * x, X),
    "copy": case(lambda x: copy.copy(x) * 2, X),
    "as_tensor": case(lambda x: torch.as_tensor(x) * 2, X),
    "numpy number first": case(lambda x: np.float64(3.0) * x + np.float32(0.5), X),
    "by axis": case(lambda x: x.sum(axis=1, keepdims=True) + torch.cat([x, x], axis=1).mean(axis=(1, 2), keepdims=True), X),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_surface(case: Callable[[], None]) -> None:
    case()


def test_a_plain_function_is_left_alone() -> None:
    x = random_tensor((3, 4)).requires_grad_()
    Swish.apply(x).sum().backward()
    s = torch.sigmoid(x)
    assert torch.allclose(x.grad, s * (1 + x * (1 - s)))
    assert torch.autograd.Function.apply.__name__ == "apply"


def test_a_hook_keeps_no_tensor() -> None:
    """Of a graph that never runs backward, too, as after an error."""

    def body(rank: int) -> None:
        y = distpatch.shard(random_tensor((1, 3, 8, 5)).requires_grad_(), dist.group.WORLD) * 2
        y.register_hook(lambda grad: grad * 3)
        kept = weakref.ref(y)
        del y
        gc.collect()
        assert kept() is None

    run_ranks(2, body)


def convolutions_kept(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpoint() -> None:
    """What is kept of a convolution may not be written to, though seams are mended."""
    x, weight = random_tensor((1, 8, 128, 64)), random_tensor((8, 8, 3, 3))

    def twice(x: Tensor, weight: Tensor) -> Tensor:
        return F.silu(F.conv2d(F.silu(F.conv2d(x, weight, padding=1)), weight, padding=1))

    def gradients(x: Tensor, run: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.requires_grad_(), weight.clone().requires_grad_()]
        run(*leaves).square().sum().backward()
        return [distpatch.gather(leaf.grad) for leaf in leaves]

    def body(rank: int) -> list[Tensor]:
        contexts = partial(create_selective_checkpoint_contexts, convolutions_kept)
        run = partial(checkpoint, twice, use_reentrant=False, context_fn=contexts)
        return gradients(distpatch.shard(x, dist.group.WORLD), run)

    expected = gradients(x.clone(), twice)
    for found in run_ranks(2, body):
        for value, right in zip(found, expected, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-10)
