"""Derivatives of derivatives: every rank makes the same exchanges in the same order, whoever's pieces are empty."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import distpatch
from distpatch.torch_utils import private
from tests.support.oracle import H, assert_same, case, random_tensor
from tests.support.threads import run_ranks
from tests.support.transports.late import late
from tests.support.zoo.models import on_ranks

X, TALL = (1, 4, H, 5), (9, 4)
FEW: dict[str, Any] = {"worlds": (2, 3), "heights": (7, 2), "order": 2}  # over gloo, and over the strict transport
LARGE: dict[str, Any] = FEW | {"heights": TALL}


def conv(**options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: F.conv2d(x, w, **options)


def resized(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, **options)


def padded(mode: str, *pads: int) -> Callable[[Tensor], Tensor]:
    return lambda x: F.pad(x, pads, mode)


def linear_at_the_end(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    """What stands after the activation has no derivative of its own, but torch's padding says that it has."""
    return lambda x, w: F.conv2d(F.pad(F.leaky_relu(x), (1, 1, 1, 1), mode), w).sum((1, 2, 3))


STENCILS = {
    "conv": case(conv(padding=1), X, (3, 4, 3, 3), **FEW),
    "conv, stride 2": case(conv(padding=1, stride=2), X, (3, 4, 3, 3), **FEW),
    "conv, stride 3, even kernel": case(conv(padding=2, stride=3), X, (3, 4, 4, 3), **FEW),
    "conv, dilation": case(conv(padding=2, dilation=2), X, (3, 4, 3, 3), **FEW),
    "conv, groups, channels_last": case(conv(padding=1, groups=2), X, (4, 2, 3, 3), channels_last=True, **FEW),
    "conv, third derivatives": case(conv(padding=1, stride=2), X, (3, 4, 3, 3), **FEW | {"order": 3}),
    "conv 1d, four ranks": case(
        lambda x, w: F.conv1d(x, w, padding=1), (2, 4, H), (3, 4, 3), dim=-1, **FEW | {"worlds": (4,)}
    ),
    "conv 3d": case(lambda x, w: F.conv3d(x, w, padding=1), (1, 2, 2, H, 3), (2, 2, 3, 3, 3), **FEW),
    "transposed": case(lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1), X, (4, 3, 4, 4), **FEW),
    "transposed, output padding": case(
        lambda x, w: F.conv_transpose2d(x, w, stride=3, padding=1, output_padding=1), X, (4, 3, 3, 3), **FEW
    ),
    "max pool": case(lambda x: F.max_pool2d(x, 3, 2, 1), X, **FEW),
    "max pool, only padding in a window": case(
        lambda x: F.max_pool2d(x, 2, 3, 1, 3, True), (2, 3, H, 6), **LARGE | {"worlds": (3, 4)}
    ),
    "mean pool": case(lambda x: F.avg_pool2d(x, 3, 2, 1), X, **FEW),
    "adaptive mean": case(lambda x: F.adaptive_avg_pool2d(x, (5, 1)), X, **FEW),
    "adaptive mean 1d": case(lambda x: F.adaptive_avg_pool1d(x, 3), (2, 3, H), dim=-1, **FEW),
    "adaptive max": case(lambda x: F.adaptive_max_pool2d(x, 3), X, **FEW),
    "global mean": case(lambda x: F.adaptive_avg_pool2d(x, 1), X, **FEW),
    "lp pool": case(lambda x: F.lp_pool2d(x.abs() + 1, 3, 2), X, **LARGE),
    "unfold": case(lambda x: F.unfold(x, 3, padding=1), X, **FEW),
    "fold": case(lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[-2:], 3, padding=1), X, **FEW),
    "nearest": case(resized(scale_factor=2), X, **FEW),
    "bilinear": case(resized(scale_factor=2, mode="bilinear"), X, **FEW),
    "bicubic to a size": case(resized(size=(5, 7), mode="bicubic"), X, **FEW),
    "smaller, antialiased": case(resized(size=(3, 3), mode="bilinear", antialias=True), X, **LARGE),
    "area": case(resized(size=(3, 3), mode="area"), X, **LARGE),
    "pad": case(padded("constant", 1, 1, 2, 1), X, **FEW),
    "pad, reflect": case(padded("reflect", 1, 1, 1, 1), X, **FEW),
    "pad, replicate": case(padded("replicate", 0, 1, 2, 1), X, **FEW),
    "pad, circular": case(padded("circular", 1, 1, 1, 2), X, **FEW),
    "pad, reflect, at the end": case(linear_at_the_end("reflect"), X, (2, 4, 3, 3), **FEW),
    "pad, replicate, at the end": case(linear_at_the_end("replicate"), X, (2, 4, 3, 3), **FEW | {"worlds": (3, 4)}),
    "pixel shuffle": case(lambda x: F.pixel_shuffle(x, 2), X, **FEW),
    "pixel unshuffle": case(lambda x: F.pixel_unshuffle(x, 2), (1, 2, H, 4), **FEW | {"heights": (6, 2)}),
    "grid sample": case(
        lambda x, g: F.grid_sample(x, g.tanh(), "bicubic", "reflection", align_corners=False),
        X, (1, 4, 3, 2), **FEW,
    ),
}  # fmt: skip
if private.RELEASE < (2, 13):  # torch itself has no second derivative of it
    del STENCILS["grid sample"]

NORMS = {
    "group norm": case(lambda x, w, b: F.group_norm(x, 2, w, b), X, (4,), (4,), **FEW),
    "group norm, third derivatives": case(lambda x, w: F.group_norm(x, 2, w), X, (4,), **FEW | {"order": 3}),
    "batch norm": case(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), X, (4,), (4,), **FEW),
    "batch norm, evaluation": case(
        lambda x, w, b: F.batch_norm(x, torch.zeros(4).double(), torch.ones(4).double(), w, b).relu_(),
        X, (4,), (4,), **FEW | {"worlds": (3, 4)},
    ),
    "instance norm": case(lambda x, w: F.instance_norm(x, None, None, w), X, (4,), **FEW),
    "layer norm of columns": case(lambda x, w, b: F.layer_norm(x, (5,), w, b), X, (5,), (5,), **FEW),
    "layer norm of pixels": case(lambda x: F.layer_norm(x, x.shape[-2:]), X, **FEW),
    "rms norm": case(lambda x: F.rms_norm(x, x.shape[-2:], eps=1e-3), X, **FEW),
    "local response norm": case(lambda x: F.local_response_norm(x, 3), X, **FEW),
    "normalize": case(lambda x: F.normalize(x, dim=-2), X, **FEW),
}  # fmt: skip


def attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens * 2, tokens.sin())


def heads(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k.sin())


OTHERS = {
    "attention": case(attention, X, **FEW),
    "linear attention": case(lambda x: torch.einsum("bchw,bdhw->bcd", x, x.softmax(1)), X, **FEW),
    "einsum": case(lambda x, w: torch.einsum("bchw,cd->bdhw", x, w), X, (4, 3), **FEW),
    "matmul": case(lambda x, w: x @ w, X, (5, 3), **FEW),
    "mean and variance": case(lambda x: (x - x.mean((-2, -1), True)) / (x.var((-2, -1), keepdim=True) + 1), X, **FEW),
    "norm": case(lambda x: x / (1 + torch.linalg.vector_norm(x)), X, **FEW),
    "logsumexp": case(lambda x: torch.logsumexp(x, -2), X, **FEW),
    "softmax of rows": case(lambda x: x.softmax(-2), X, **FEW),
    "product": case(lambda x: x.prod(-2), X, **FEW),
    "largest": case(lambda x: x.amax((-2, -1), keepdim=True) * x, X, **FEW),
    "cumsum": case(lambda x: x.cumsum(-2), X, **FEW),
    "rows of another order": case(lambda x: torch.cat([x.flip(-2), x.roll(1, -2)], -2) * 2, X, **FEW),
    "gather": case(lambda x: x.gather(-2, torch.zeros(1, 4, 2, 5).long()), X, **FEW),
    "index_select": case(lambda x: x.index_select(-2, torch.tensor([1, 0, 1])), X, **FEW),
    "scatter_add": case(lambda x: (x * 1).scatter_add(-1, (x > 0).long(), x.sin()), X, **FEW),
    "largest so far, of columns": case(lambda x: x.cummax(-1)[0], X, **FEW),
    "norm where a rank has zeros": case(
        lambda x: torch.linalg.vector_norm(x * (torch.arange(x.shape[-2]) < 2)[:, None], 3.5), X, **LARGE
    ),
    "merged, in place": case(lambda x: (x * 1).flatten(1, 2).mul_(2).sub_(1), X, **FEW),
    "attention, heads sharded": case(heads, (2, H, 5, 4), (2, H, 6, 4), dim=1, sharded=2, **FEW),
    "fft": case(lambda x: torch.fft.rfft2(x).abs().square(), X, **FEW),
    "embedding": case(lambda x, w: F.embedding((x > 0).long(), w) * x[..., None], X, (2, 3), **FEW),
    "cross entropy": case(lambda x: F.cross_entropy(x, (x[:, 0] > 0).long()), X, **FEW),
    "a transposed image": case(lambda x, w: F.conv2d(x.transpose(-1, -2), w, padding=1), X, (3, 4, 3, 3), **FEW),
}


@pytest.mark.parametrize("case", STENCILS.values(), ids=STENCILS)
def test_stencils(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
def test_norms(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_others(case: Callable[[], None]) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # which has a second derivative; chosen for all threads
        case()


class Discriminator(nn.Module):
    """Reflect padding, norms and blocks that may be recomputed; nothing but linear functions at the end."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.SiLU()),
                nn.Sequential(
                    nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.2)
                ),
                nn.Sequential(nn.Upsample(scale_factor=2), spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), nn.ReLU()),
            ]
        )
        self.out = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(4, 1, 3))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
        return self.out(x).mean((1, 2, 3))


def discriminator(recompute: bool | None = None) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(recompute).double().eval()  # eval: spectral norms keep their vectors


IMAGE = random_tensor((2, 3, 8, 6))


def penalised(model: nn.Module) -> list[Tensor]:
    """Three steps of R1: Mescheder et al., Which Training Methods for GANs do actually Converge?, 2018."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        image = random_tensor((2, 3, 8, 6), step).requires_grad_()
        score = model(image)
        (gradient,) = torch.autograd.grad(score.sum(), image, create_graph=True)
        (F.softplus(-score).mean() + 5 * gradient.square().sum((1, 2, 3)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def penalty_alone(model: nn.Module) -> list[Tensor | None]:
    """Of parameters that have no part in it there is no gradient."""
    image = IMAGE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(image).sum(), image, create_graph=True)
    gradient.square().sum().backward()
    return [image.grad, *(p.grad for p in model.parameters())]


def path_length(model: nn.Module) -> list[Tensor | None]:
    """Karras et al., Analyzing and Improving the Image Quality of StyleGAN, 2020."""
    image = IMAGE.clone().requires_grad_()
    inner = model.blocks[0](image)
    noise = random_tensor(tuple(inner.shape), 3)
    (gradient,) = torch.autograd.grad((inner * noise).sum(), image, create_graph=True)
    (gradient.square().sum((1, 2, 3)).sqrt() - 0.3).square().mean().backward()
    return [image.grad, *(p.grad for p in model.parameters())]


def of_some(model: nn.Module) -> list[Tensor | None]:
    """Gradients of a few inputs, one of them unused, twice by the same graph, then of one input of the second."""
    image, other = IMAGE.clone().requires_grad_(), torch.zeros(1).double().requires_grad_()
    first, last = model.blocks[0][0].weight, model.out[1].weight
    score = model(image).tanh().sum()
    inputs = [first, image, other]
    once = torch.autograd.grad(score, inputs, create_graph=True, allow_unused=True)
    again = torch.autograd.grad(score, inputs, retain_graph=True, allow_unused=True)
    twice = torch.autograd.grad(once[0].square().sum(), [last, image], retain_graph=True)
    torch.autograd.backward(once[1].square().sum(), inputs=[first])
    return [*once, *again, *twice, first.grad]


def hooked(model: nn.Module) -> list[Tensor | None]:
    """Hooks see the first pass and the second, and may change what they see."""
    seen: list[Tensor] = []

    def hook(gradient: Tensor) -> Tensor:
        seen.append(distpatch.gather(gradient).detach())
        return gradient * 2

    def watch(module: nn.Module, args: Any, result: Tensor) -> None:
        result.register_hook(hook)

    handle = model.blocks[1].register_forward_hook(watch)
    grads = penalty_alone(model)
    handle.remove()
    return [*grads, *seen]


def functional(name: str) -> Callable[[nn.Module], list[Tensor | None]]:
    def run(model: nn.Module) -> list[Tensor | None]:
        function = getattr(torch.autograd.functional, name)
        image = random_tensor((1, 3, 5, 4), 1)
        vector = [] if name in {"jacobian", "hessian"} else [random_tensor((1, 3, 5, 4), 2)]
        if name == "vjp":
            vector = [random_tensor((1,), 2)]

        def call(x: Tensor) -> Tensor:
            return model(x).tanh() if name in {"jvp", "vjp", "jacobian"} else model(x).tanh().sum()

        result = function(call, image, *vector)
        return list(result) if isinstance(result, tuple) else [result]

    return run


def backward_alone(model: nn.Module) -> list[Tensor | None]:
    image = IMAGE.clone().requires_grad_()
    model(image).tanh().sum().backward()
    return [image.grad, *(p.grad for p in model.parameters())]


class Recomputed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False)


def around(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """With all of each call recomputed, which the ranks leave together, too."""
    return lambda model: run(Recomputed(model))


TRAINED: dict[str, tuple[Callable[[Any], Any], bool | None]] = {
    "R1": (penalised, None),
    "R1, recomputed": (penalised, False),
    "penalty alone": (penalty_alone, None),
    "penalty alone, recomputed": (penalty_alone, False),
    "recomputed by another backward": (backward_alone, True),
    "recomputed around": (around(backward_alone), None),
    "R1, recomputed around": (around(penalised), None),
    "some inputs": (of_some, None),
    "hooks": (hooked, None),
    **{name: (functional(name), None) for name in ("hvp", "vhp", "jvp", "vjp", "jacobian", "hessian")},
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "gloo"])
@pytest.mark.parametrize("name", TRAINED)
def test_trained(name: str, strict: bool) -> None:
    """On 2 ranks, and on 3 and 4, of which some have no rows of the inner images. A hang ends by a ``RankError``."""
    run, recompute = TRAINED[name]
    right = run(discriminator(recompute))
    for world in (2, 3, 4) if strict and name == "penalty alone" else (3,) if strict else (2,):
        with late() if strict else contextlib.nullcontext():
            ranks = run_ranks(world, on_ranks(discriminator(recompute), lambda model, rank: run(model)))
        for rank, found in enumerate(ranks):
            assert len(found) == len(right)
            for index, (value, wanted) in enumerate(zip(found, right, strict=True)):
                assert_same(value, wanted, 1e-9, f"{name}[{index}] on rank {rank} of {world}")


def test_path_length() -> None:
    """Of a module inside, which alone is converted."""
    right = path_length(discriminator())

    models = [discriminator() for _ in range(3)]

    def body(rank: int) -> list[Tensor | None]:
        distpatch.convert_model(models[rank].blocks[0], dist.group.WORLD)
        return path_length(models[rank])

    with late():
        for found in run_ranks(3, body):
            for value, wanted in zip(found, right, strict=True):
                assert_same(value, wanted, 1e-9, "path length")


def test_graphs_are_freed() -> None:
    """After each step nothing keeps the activations, nor grows."""

    def body(model: Any, rank: int) -> list[int]:
        alive: list[weakref.ref[Tensor]] = []
        model.blocks[1].register_forward_hook(lambda module, args, result: alive.append(weakref.ref(result.local)))
        counts = []
        for _ in range(4):
            penalised(model)
            gc.collect()
            counts.append(sum(ref() is not None for ref in alive))
        return counts

    assert run_ranks(2, on_ranks(discriminator(), body)) == [[0] * 4] * 2


def test_what_torch_cannot_differentiate_twice() -> None:
    """The same error on every rank, also on one without rows."""
    x = random_tensor((1, 2, 3, 4))

    def body(rank: int) -> str:
        leaf = x.clone().requires_grad_()
        sharded = distpatch.shard(leaf, dist.group.WORLD)
        out = distpatch.gather(F.scaled_dot_product_attention(sharded, sharded, sharded))
        (gradient,) = torch.autograd.grad(out.sin().sum(), leaf, create_graph=True)
        try:
            gradient.square().sum().backward()
        except RuntimeError as error:
            return str(error)
        return "no error"

    plain = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        F.scaled_dot_product_attention(plain, plain, plain).sin().sum(), plain, create_graph=True
    )
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.square().sum().backward()
    for message in run_ranks(4, body):
        assert "not implemented" in message


def test_torch_func_is_refused() -> None:
    def body(model: Any, rank: int) -> None:
        with pytest.raises(distpatch.UnsupportedOpError, match="use torch.autograd.grad"):
            torch.func.grad(lambda x: model(x).sum())(IMAGE)

    run_ranks(2, on_ranks(discriminator(), body))
