"""What the pool's processes compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from tests.support.oracle import random_tensor
from tests.support.zoo.models import tiny_kl, tiny_unet

CHANNELS = {"decoder": 4, "unet": 3}


def model_of(kind: str, dtype: torch.dtype) -> nn.Module:
    return tiny_kl(channels=(4, 4), dtype=dtype) if kind == "decoder" else tiny_unet(dtype)


def picture(kind: str, call: Callable[..., Any], image: Any) -> Any:
    return (call(image) if kind == "decoder" else call(image, 3)).sample


def values(
    rank: int,
    kind: str,
    way: str,
    backend: str,
    dtype: torch.dtype,
    sizes: list[tuple[int, int, int]],
    grads: bool = False,
) -> list[list[Tensor | None]]:
    """What the model makes of each size, and its gradients: plain (``way`` is ""), or compiled, twice each.

    ``way``: "converted": the converted model's entry point is compiled; "option": by ``convert_model``; "inside": a
    module of the converted model; "sharded": the module, called with sharded tensors.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model: Any = model_of(kind, dtype)
    whole = model.decode if kind == "decoder" else model
    if way in {"converted", "inside", "option"}:
        option = {"backend": backend} if way == "option" else False
        distpatch.convert_model(model, dist.group.WORLD, fallback="error", compile=option)
        whole = model.decode if kind == "decoder" else model
        if way == "converted":
            whole = torch.compile(whole, fullgraph=True, backend=backend)
        elif way == "inside":
            part = model.decoder if kind == "decoder" else model.mid_block
            part.compile(fullgraph=True, backend=backend)
    elif way == "sharded":
        whole = torch.compile(whole, fullgraph=True, backend=backend)
    results = []
    for made, size in enumerate(sizes, start=1):
        batch, *spatial = size
        for again in (False, True) if way else (False,):
            image = random_tensor((batch, CHANNELS[kind], *spatial)).to(dtype).requires_grad_(grads)
            given = distpatch.shard(image, dist.group.WORLD) if way == "sharded" else image
            with torch.set_grad_enabled(grads), torch._dynamo.config.patch(error_on_recompile=again):
                result = distpatch.gather(picture(kind, whole, given))
            if way:
                assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made
            if grads:
                model.zero_grad()
                (result * random_tensor(tuple(result.shape), seed=1).to(dtype)).sum().backward()
        found = [result.detach(), image.grad, *(parameter.grad for parameter in model.parameters())]
        results.append([None if t is None else t.clone() for t in found])
    return results


class Tokens(nn.Module):
    """Image tokens attend to themselves and to a text's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(4, 8).double(), nn.Linear(6, 8).double()

    def forward(self, hidden_states: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        query = self.image(hidden_states) * ids
        key = torch.cat([self.text(text), query], 1)
        heads = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (query, key, key))
        return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def tokens_by_name(rank: int) -> list[Tensor]:
    """A model of tokens on one device, converted, and compiled."""
    torch._dynamo.reset()
    given = random_tensor((2, 7, 4)), random_tensor((2, 3, 6), 1)
    ids = random_tensor((7, 1), 2)
    results = [Tokens()(*given, ids=ids)]
    options = {"shard": {"hidden_states": 1, "ids": 0}, "fallback": "error"}
    for attention in ("gather", "ring", "all_to_all"):
        for compiled in (False, {"backend": "aot_eager"}):
            model = distpatch.convert_model(
                Tokens(), dist.group.WORLD, attention=attention, compile=compiled, **options
            )
            with torch.no_grad():
                results += [model(*given, ids=ids), model(given[0], text=given[1], ids=ids)]
    return [result.detach() for result in results]


class PixelsAndText(nn.Module):
    """Pixels become tokens, are joined with a text's, attend, and become pixels again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Conv2d(3, 8, 3, padding=1).double(), nn.Conv2d(8, 3, 3, padding=1).double()
        self.text, self.heads = nn.Parameter(torch.randn(1, 5, 8).double()), nn.Linear(8, 24).double()

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.into(x)
        tokens = torch.cat([self.text.expand(len(x), -1, -1), pixels.flatten(2).transpose(1, 2)], 1)
        heads = self.heads(tokens).view(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        tokens = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)[:, 5:]
        return self.out(tokens.transpose(1, 2).unflatten(2, pixels.shape[2:]))


def pixels_and_text(rank: int, dim: int, backend: str) -> list[list[Tensor]]:
    """The output and all gradients: on one device, and compiled on the ranks."""
    torch._dynamo.reset()
    results = []
    for sharded in (False, True):
        model: Any = PixelsAndText()
        if sharded:
            group, options = dist.group.WORLD, {"fallback": "error", "compile": {"backend": backend}}
            distpatch.convert_model(model, group, dim=dim, **options)
        x = random_tensor((2, 3, 7, 9)).requires_grad_()
        out = model(x)
        (out * random_tensor(out.shape, 1)).sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])
    return results


class InTwoGraphs(nn.Module):
    """``writes``: also to a row of the first graph, in the second."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.writes = writes
        torch.manual_seed(0)
        self.first, self.norm, self.last = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 3, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        row, pairs = y[:, :, 0], y.view(len(y), 4, -1, 10)
        y = y.to(memory_format=torch.channels_last)
        torch._dynamo.graph_break()
        if self.writes:
            row.zero_()
        return self.last(nn.functional.silu(self.norm(y))) * row[:, :3].mean() + pairs.mean()


def in_two_graphs(rank: int) -> tuple[list[str], Tensor, Tensor]:
    """What is said of one graph, and of a write in the second of two; the values in two, and on one device."""
    torch._dynamo.reset()
    model, x = InTwoGraphs().double(), random_tensor((2, 3, 6, 5))
    messages = []

    def converted(writes: bool, fullgraph: bool) -> nn.Module:
        option = {"backend": "aot_eager", "fullgraph": fullgraph}
        return distpatch.convert_model(InTwoGraphs(writes).double(), dist.group.WORLD, compile=option)

    with torch.no_grad():
        for case in ((False, True), (True, False)):
            try:
                converted(*case)(x)
            except Exception as error:
                messages.append(str(error))
        return messages, converted(False, False)(x), model(x)


def called_differently(rank: int) -> tuple[str, Tensor]:
    """A compiled call with another shape on one rank, then a proper one."""
    torch._dynamo.reset()
    model = distpatch.convert_model(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1)), dist.group.WORLD)
    nn.init.ones_(model[0].weight)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    message = ""
    with torch.no_grad():
        try:
            compiled(torch.ones(1, 3, 6 + rank, 4))
        except distpatch.RankError as error:
            message = str(error)
        return message, compiled(torch.ones(1, 3, 7, 4)) - model(torch.ones(1, 3, 7, 4))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0]  # not the derivative, so that it is seen


def a_function_of_ones_own(rank: int) -> Tensor | None:
    """Without sharded tensors, compiled with no graph break."""
    torch._dynamo.reset()
    leaf = torch.ones(3, requires_grad=True)
    torch.compile(lambda x: Square.apply(x).sum(), fullgraph=True, backend="aot_eager")(leaf).backward()
    return leaf.grad


def gradients_across(rank: int, leaf: bool) -> str:
    """A function compiled by itself, with gradients of a weight, or of the sharded tensor too."""
    torch._dynamo.reset()
    image, weight = torch.ones(1, 3, 4, 4, requires_grad=leaf), torch.ones(3, 3, 1, 1, requires_grad=True)
    convolve = torch.compile(torch.nn.functional.conv2d, fullgraph=True, backend="aot_eager")
    try:
        convolve(distpatch.shard(image, dist.group.WORLD), weight)
    except Exception as error:
        return str(error)
    return "no error"


def steps_between_compiled_calls(rank: int) -> list[Tensor]:
    """``compile=True``: a compiled call, displaced steps, which are not, another one, and one of the restored model."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model: Any = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1)).double()
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    image = random_tensor((1, 3, 8, 4))
    distpatch.convert_model(model, dist.group.WORLD, compile={"backend": "aot_eager"})
    with torch.no_grad():
        results = [model(image)]
        with distpatch.displaced(model, warmup_steps=1):
            results += [model(image) for _ in range(3)]
        results.append(model(image))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        return [*results, distpatch.restore_model(model)(image)]


def _blank_rows(y: Tensor) -> Tensor:
    y[:, :, 2:4] = 0
    return y


def _add_to_a_view(y: Tensor) -> Tensor:
    y[:, :2].add_(y.new_ones(()))
    return y


def _double_another_view(y: Tensor) -> Tensor:
    y.view(len(y), 2, -1, *y.shape[2:]).mul_(2)
    return y


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "in place": lambda y: nn.functional.silu(y, inplace=True),
    "in place twice": lambda y: y.add_(1).mul_(y),
    "some rows": _blank_rows,
    "a view of channels": _add_to_a_view,
    "another view": _double_another_view,
    "by rows": lambda y: y * torch.arange(y.shape[2], dtype=y.dtype).view(-1, 1),
    "joined": lambda y: torch.cat([y, y.neg()], 1)[:, 2:6],
    "rolled": lambda y: y.roll(1, 2),
    "flipped": lambda y: y.flip(2),
    "taller": lambda y: nn.functional.interpolate(y, scale_factor=2.0),
    "cropped": lambda y: y[:, :, 1:],
    "copied": lambda y: y.copy_(y.flip(3)),
}


class Changed(nn.Module):
    """What a norm has made is changed before a convolution reads its neighbours' rows: each change in turn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
        self.last = nn.Conv2d(4, 3, 3, padding=1)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        results = []
        for norm in self.norms:
            for change in CHANGES.values():
                y = norm(x)
                results += [self.last(change(y)), self.last(y)]
        return tuple(results)


def changed_between(rank: int, height: int) -> list[tuple[str, Tensor, Tensor]]:
    """On one device, and compiled on the ranks; without gradients, so that halos come with moments."""
    torch._dynamo.reset()
    x, names = random_tensor((2, 4, height, 5)), [name for name in CHANGES for _ in range(2)] * 2
    with torch.no_grad():
        right = Changed().double()(x)
        model = distpatch.convert_model(Changed().double(), dist.group.WORLD, compile={"backend": "aot_eager"})
        return list(zip(names, model(x), right, strict=True))


def rounds(rank: int) -> list[list[tuple[str, int]]]:
    """What a decode sends, eager and compiled."""
    torch._dynamo.reset()
    found = []
    for option in (False, {"backend": "aot_eager"}):
        model: Any = distpatch.convert_model(
            model_of("decoder", torch.float64), dist.group.WORLD, fallback="error", compile=option
        )
        with torch.no_grad():
            model.decode(torch.ones(1, CHANNELS["decoder"], 7, 4).double())
            with distpatch.trace() as trace:
                model.decode(torch.ones(1, CHANNELS["decoder"], 7, 4).double())
        found.append([(record.op, record.sent_bytes) for record in trace.records])
    return found
