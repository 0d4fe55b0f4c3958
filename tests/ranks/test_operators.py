"""Operators of ``torch.ops``, exported programs, TorchScript: run by the rules of the functions that they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from distpatch.rules.shapes import gather_scatter
from distpatch.torch_utils.tree import tensors_in
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

X = (2, 3, H, 5)
aten = torch.ops.aten
SOME = {"heights": (7, 3), "worlds": (2, 3)}
NORM = (1e-5, False)


def reversed_rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2]).flip(0)


OPERATORS = {
    "convolution": case(
        lambda x, w: aten.convolution.default(x, w, None, [1, 2], [1, 1], [1, 1], False, [0, 0], 1), X, (4, 3, 3, 3), **SOME
    ),
    "transposed convolution": case(
        lambda x, w: aten.convolution.default(x, w, None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1), X, (3, 4, 3, 3), **SOME
    ),
    "conv2d, by name": case(lambda x, w: aten.conv2d(input=x, weight=w, padding="same"), X, (4, 3, 3, 3), **SOME),
    "native_group_norm": case(lambda x: tuple(aten.native_group_norm.default(x, None, None, 2, 3, x[0, 0].numel(), 3, 1e-5)), X, **SOME),
    "native_layer_norm": case(lambda x: tuple(aten.native_layer_norm(x, [5], None, None, 1e-5)), X, **SOME),
    "layer_norm": case(lambda x: aten.layer_norm.default(x, [5], None, None, *NORM), X, **SOME),
    "native_batch_norm": case(lambda x: tuple(aten.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)), X, **SOME),
    "batch norm, functional": case(
        lambda x: aten._native_batch_norm_legit_functional(x, None, None, *x.new_ones(2, 3).unbind(), True, 0.1, 1e-5), X, **SOME
    ),
    "max_pool2d_with_indices": case(lambda x: aten.max_pool2d_with_indices(x, [2, 2]), X, **SOME),
    "avg_pool2d": case(lambda x: aten.avg_pool2d.default(x, [2, 2], []), X, **SOME),
    "nearest": case(lambda x: aten.upsample_nearest2d.vec(x, None, [2.0, 2.0]), X, **SOME),
    "nearest of a size": case(lambda x: aten.upsample_nearest2d.default(x, [2 * x.shape[2], 10], 2.0, 2.0), X, **SOME),
    "bilinear": case(lambda x: aten.upsample_bilinear2d.vec(x, [9, 9], True, None), X, **SOME),
    "reflection_pad2d": case(lambda x: aten.reflection_pad2d.default(x, [1, 1, 1, 1]), X, **SOME),
    "constant_pad_nd": case(lambda x: aten.constant_pad_nd(x, [1, 0, 0, 2], 2.0), X, **SOME),
    "softmax": case(lambda x: aten._softmax.default(x, 2, False), X, **SOME),
    "attention": case(lambda x: aten.scaled_dot_product_attention(x, x, x), X, **SOME),
    "attention, decomposed": case(lambda x: aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0], X, **SOME),
    "slice": case(lambda x: aten.slice.Tensor(x, 2, 1, 9223372036854775807, 2), X, **SOME),
    "copies of views": case(lambda x: aten.permute_copy(aten.unsqueeze_copy(x, 0), [0, 1, 3, 4, 2]), X, **SOME),
    "add, by place": case(lambda x: aten.add.Scalar(x, 1, 2) + aten.add.Tensor(x, x, alpha=3), X, **SOME),
    "in place": case(lambda x: aten.add_.Tensor(aten.neg_.default(aten.clone(x)), x, alpha=2), X, **SOME),
    "out": case(lambda x: aten.sin.out(x.detach(), out=torch.empty_like(x)), X, **SOME),
    "a view that is written to": case(lambda x: (y := x * 1, aten.copy_(aten.select(y, 1, 0), y[:, 1]))[0], X, **SOME),
    "rows by numbers": case(lambda x: aten.index.Tensor(x, [None, None, reversed_rows(x)[:, None], torch.arange(4)]), X, **SOME),
    "rows, selected": case(lambda x: aten.index_select(x, 2, reversed_rows(x)), X, **SOME),
    "dtype and sizes": case(lambda x: aten._to_copy(x, dtype=torch.float32).double() * aten.sym_size.int(x, 2), X, **SOME),
    "no function of torch's": case(
        lambda x: aten.renorm.default(x, 2, 2, 1.0), X, fallback="aten.renorm.default", **SOME
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OPERATORS.values(), ids=OPERATORS)
def test_operators(case: Callable[[], None]) -> None:
    case()


def test_rows_by_numbers_that_only_the_device_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_scatter, "_readable", lambda numbers: False)
    case(lambda x: x[:, :, reversed_rows(x) - x.shape[2]], X, **SOME)()


class Net(nn.Module):
    """What convolutional nets are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.up = (
            nn.Conv2d(3, 6, 3, 1, 1),
            nn.Conv2d(6, 6, 3, 2, 1),
            nn.ConvTranspose2d(6, 6, 2, 2),
        )
        self.group, self.batch, self.layer = nn.GroupNorm(2, 6), nn.BatchNorm2d(6), nn.LayerNorm(6)
        self.query, self.slope = nn.Linear(6, 6), nn.PReLU(6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.group(self.first(x)))
        y = F.interpolate(F.max_pool2d(self.batch(y), 2), scale_factor=2.0)
        y = F.gelu(self.up(self.down(self.slope(y)))) + F.adaptive_avg_pool2d(y, 1)
        y = F.interpolate(F.avg_pool2d(y, 3, 1, 1), size=(x.shape[2], x.shape[3]), mode="bilinear")
        t = self.layer(y.flatten(2).transpose(1, 2))
        q = self.query(t)
        t = F.scaled_dot_product_attention(q.unsqueeze(1), t.unsqueeze(1), t.unsqueeze(1)).squeeze(1)
        y = torch.cat([y, t.transpose(1, 2).reshape(y.shape)], 1)
        y = F.pad(y, (1, 1, 1, 1), mode="reflect")
        a, b = y.chunk(2, 1)
        return a[:, :, 1:] * b.mean((2, 3), keepdim=True)


class Module(nn.Module):
    """A function behind a convolution."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 3, 3, padding=1), inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.conv(x))


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@torch.jit.script
def of_lists(xs: list[Tensor], scale: float = 2.0) -> Tensor:
    out: list[Tensor] = []
    for i, x in enumerate(xs):
        if i % 2 == 0:
            out.append(x * scale)
        else:
            out.append(x + i)
    return F.pad(torch.cat(out, dim=1)[:, :, 1:-1], [0, 0, 1, 1], mode="replicate")


@torch.jit.script
def loops(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    i = 0
    while i < 2:
        x = x + x.mean(dim=[2, 3], keepdim=True)
        i += 1
    a, b, h, w = x.shape
    assert h > 0, "no rows"
    zeros = torch.zeros([a, b, h, w], dtype=x.dtype, device=x.device)
    return x + zeros, {"half": x.to(torch.float64) / 2, "flat": x.view(a, b, h * w).transpose(1, 2)}


@torch.jit.script
def written(x: Tensor) -> Tensor:
    y = x * 1
    y.mul_(2)
    y[:, 0] = 1.0
    return y


class Pair(NamedTuple):
    value: Tensor
    count: int


@torch.jit.script
def named_tuple(x: Tensor) -> Pair:
    return Pair(x, 3)


def exported(train: bool, core: bool) -> nn.Module:
    program = torch.export.export(Net().double().train(train), (random_tensor((2, 3, 10, 6)),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (program.run_decompositions() if core else program).module()


def frozen() -> nn.Module:
    """Its weights are constants, which no state dict has."""
    torch.manual_seed(1)
    return torch.jit.freeze(torch.jit.script(Net().double().eval()))


MODELS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "exported": (lambda: exported(False, False), None),
    "exported, training": (lambda: exported(True, False), None),
    "exported, decomposed": (lambda: exported(False, True), None),
    "symbolically traced": (lambda: torch.fx.symbolic_trace(Module(nn.SiLU())), None),
    "scripted function": (lambda: Module(swish), None),
    "scripted function of a list": (lambda: Module(lambda x: of_lists([x, x * 2, x], scale=3.0)), None),
    "scripted loops": (lambda: Module(loops), None),
    "scripted writes": (lambda: Module(written), None),
    "scripted model": (lambda: torch.jit.script(Net()), None),
    "scripted part": (lambda: Module(torch.jit.script(Net())), None),
    "traced model": (lambda: torch.jit.trace(Net().double().eval(), random_tensor((2, 3, 10, 6))), None),
    "frozen": (lambda: frozen(), None),
    "a class that the script knows alone": (lambda: Module(named_tuple), "named_tuple"),
}


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    tensors = list(tensors_in(model(x)))
    if tensors[0].requires_grad:
        sum((t * random_tensor(tuple(t.shape))).sum() for t in tensors).backward()
    gradients = [t.grad for t in (x, *model.parameters()) if t.grad is not None]
    return [t.detach() for t in (*tensors, *gradients, *model.buffers())]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    """Outputs, gradients and buffers of the model as it is on one device; gathered only where that is said."""
    build, gathered = MODELS[name]
    x = random_tensor((2, 3, 10, 6))
    torch.manual_seed(0)
    models = [build().double() for _ in range(4)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    before = {key: value.clone() for key, value in models[0].state_dict().items()}
    expected = results(models[0], x)
    for world in (2, 3):

        def body(rank: int) -> tuple[list[Tensor], set[str]]:
            model = models[1 + rank]
            model.zero_grad()
            model.load_state_dict(before)
            distpatch.convert_model(model, dist.group.WORLD)
            with distpatch.trace() as t:
                values = results(model, x)
            distpatch.restore_model(model)
            return values, {record.op for record in t.fallbacks}

        for values, ops in run_ranks(world, body, keep=True):
            assert ops == ({gathered} if gathered else set())
            for value, right in zip(values, expected, strict=True):
                torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-9)


def test_a_refused_script_is_named() -> None:
    """Where its graph is not known it is gathered under its name, or refused by it."""

    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 3, 6, 4)), dist.group.WORLD)
        x = distpatch.PatchTensor(
            x.local, x.row_layout, replace(x.region, options=replace(x.region.options, fallback="error"))
        )
        with pytest.raises(distpatch.UnsupportedOpError, match="named_tuple has no sharded rule"):
            named_tuple(x)
        assert type(swish(x)) is type(x)

    run_ranks(2, body)


HIDDEN: dict[str, Callable[[Tensor], object]] = {
    "vmap": torch.vmap(torch.sin),
    "vmap beside": lambda x: torch.vmap(lambda t: x * t)(torch.ones(3, dtype=x.dtype)),
    "grad": torch.func.grad(lambda t: t.sin().sum()),
    "vjp": lambda x: torch.func.vjp(torch.sin, x),
    "functionalize": torch.func.functionalize(torch.sin),
    "jit.trace": lambda x: torch.jit.trace(torch.sin, x),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_ways_that_hide_the_tensor_are_named(name: str) -> None:
    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD)
        with pytest.raises(distpatch.UnsupportedOpError, match="below the table of rules"):
            HIDDEN[name](x)

    run_ranks(2, body)


def test_forward_mode_derivatives_are_refused() -> None:
    """Of a tensor that has a tangent, or may get one by what it meets: a sum over ranks would lose it."""

    def sharded(rank: int) -> distpatch.PatchTensor:
        return distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD)

    def body(rank: int) -> None:
        for call in (lambda: (made[rank] * dual).sum(), lambda: distpatch.shard(dual, dist.group.WORLD)):
            with pytest.raises(distpatch.UnsupportedOpError, match="inside torch.autograd.forward_ad.dual_level"):
                call()

    made = run_ranks(2, sharded, keep=True)
    with torch.autograd.forward_ad.dual_level():  # of all threads
        dual = torch.autograd.forward_ad.make_dual(torch.ones(2, 3), torch.ones(2, 3))
        run_ranks(2, body, keep=True)
