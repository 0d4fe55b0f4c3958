"""Every family of rules once or more, as functions of a sharded image and replicated weights; and their exactness."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from benchmarks.gpu.nets import SdDecoder, UNet, WanDecoder, seeded

ROWS = 11
TOLERANCE = 1e-9  # fp64; differences over the largest value
IMAGE = (2, 4, ROWS, 6)
TOKENS = (2, 2, ROWS, 4)
KERNEL = (4, 4, 3, 3)
CHANNELS = (4,)


@dataclass(frozen=True)
class Case:
    """``fn`` of tensors of these shapes, of which the first ``sharded`` are images sharded by rows."""

    family: str
    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    sharded: int = 1


def _table() -> Iterator[Case]:
    def add(family: str, fn: Callable[..., Any], *shapes: tuple[int, ...], sharded: int = 1) -> Case:
        return Case(family, fn, shapes, sharded)

    yield add("convolution", lambda x, w, b: F.conv2d(x, w, b, padding=1), IMAGE, KERNEL, CHANNELS)
    yield add("convolution", lambda x, w: F.conv2d(x, w, stride=2), IMAGE, KERNEL)
    yield add("convolution", lambda x, w: F.conv2d(x, w, padding=4, dilation=4), IMAGE, KERNEL)
    yield add("convolution", lambda x, w: F.conv2d(x, w, padding=(6, 0), groups=2), IMAGE, (4, 2, 13, 3))
    yield add("convolution", lambda x, w: F.conv2d(F.pad(x, (1, 1, 2, 3), mode="reflect"), w), IMAGE, KERNEL)
    yield add("convolution", lambda x, w: F.conv3d(x, w, padding=1), (1, 2, 3, ROWS, 4), (3, 2, 3, 3, 3))
    yield add("transposed", lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1), IMAGE, (4, 3, 4, 4))
    yield add("transposed", lambda x, w: F.conv_transpose2d(x, w, padding=1), IMAGE, KERNEL)
    yield add("normalization", lambda x, w, b: F.group_norm(x, 2, w, b), IMAGE, CHANNELS, CHANNELS)
    yield add("normalization", F.instance_norm, IMAGE)
    yield add("normalization", lambda x, w, b: F.batch_norm(x, None, None, w, b, True), IMAGE, CHANNELS, CHANNELS)
    yield add("normalization", lambda x, w: F.layer_norm(x, (6,), w), IMAGE, (6,))
    yield add("normalization", lambda x: F.normalize(x, dim=1), IMAGE)
    yield add("pooling", lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE)
    yield add("pooling", lambda x: F.avg_pool2d(x, 2), IMAGE)
    yield add("pooling", lambda x: F.adaptive_avg_pool2d(x, (3, 2)), IMAGE)
    yield add("resizing", lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), IMAGE)
    yield add("resizing", lambda x: F.interpolate(x, size=(17, 9), mode="bilinear"), IMAGE)
    yield add("resizing", lambda x: F.interpolate(x, size=(6, 4), mode="bicubic", align_corners=True), IMAGE)
    yield add("padding", lambda x: F.pad(x, (1, 2, 3, 2), mode="replicate"), IMAGE)
    yield add("padding", lambda x: F.pad(x, (0, 0, 4, 1), mode="circular"), IMAGE)
    yield add(
        "element by element", lambda x, y, w: torch.sigmoid(x) * y + w[:, None, None], IMAGE, IMAGE, CHANNELS, sharded=2
    )
    yield add("element by element", lambda x: F.silu(x).clamp(-0.5, 0.5).add_(1.0), IMAGE)
    yield add("attention", F.scaled_dot_product_attention, TOKENS, TOKENS, TOKENS, sharded=3)
    yield add("attention", F.scaled_dot_product_attention, TOKENS, (2, 2, 5, 4), (2, 2, 5, 4))
    yield add("attention", lambda q: (q @ q.transpose(-1, -2)).softmax(-1) @ q, TOKENS)
    yield add("matrix products", F.linear, IMAGE, (3, 6), (3,))
    yield add("matrix products", lambda x, y: torch.einsum("bchw,bdhw->bcd", x, y), IMAGE, IMAGE, sharded=2)
    yield add("reductions", lambda x: (x.sum((-2, -1)), x.mean(), x.var(-2)), IMAGE)
    yield add("reductions", lambda x: (x.amax((2, 3)), x.softmax(-2), x.logsumexp(-2)), IMAGE)
    yield add("along the rows", lambda x: x.cumsum(-2), IMAGE)
    yield add("along the rows", lambda x: x.flip(-2), IMAGE)
    yield add("along the rows", lambda x: x.roll(3, -2), IMAGE)
    yield add("shapes", lambda x: x.flatten(2).transpose(1, 2).contiguous(), IMAGE)
    yield add("shapes", lambda x: x[:, :, 1:].reshape(2, 4, 5, 2, 6).permute(0, 1, 3, 2, 4), IMAGE)
    yield add("indexing", lambda x: (x[..., 2:9:3, :], x[:, 1:3, 4]), IMAGE)
    yield add("joining", lambda x, y: (torch.cat([x, y], 1), torch.cat([x, y], -2)), IMAGE, IMAGE, sharded=2)
    yield add("unfolding", lambda x: F.unfold(x, 3, padding=1), IMAGE)
    yield add("unfolding", lambda x: F.pixel_shuffle(x, 2), IMAGE)
    yield add("unfolding", lambda x: F.pixel_unshuffle(x[:, :, :10], 2), IMAGE)
    yield add("losses", F.mse_loss, IMAGE, IMAGE, sharded=2)
    yield add("losses", lambda x, y: F.cross_entropy(x, y.softmax(1)), IMAGE, IMAGE, sharded=2)
    yield add("Fourier", lambda x: torch.fft.rfft2(x).abs(), IMAGE)
    yield add("sampling", lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), IMAGE, (2, 5, 4, 2))


CASES = tuple(_table())


def bounds_of(rows: int, world: int, seed: int = 0) -> tuple[int, ...]:
    """Uneven bounds, the same on every rank; a rank may own very few rows, or none."""
    draw = random.Random(f"{rows} {world} {seed}")
    return (0, *sorted(draw.randint(0, rows) for _ in range(world - 1)), rows)


def normal(shape: Sequence[int], seed: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values of a generator of their own, made on the CPU: the same on every rank and device."""
    return torch.randn(tuple(shape), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(
        device, dtype
    )


def case_error(case: Case, group: Any, device: torch.device, seed: int = 0) -> float:
    """The largest difference of this rank's sharded run from the unsharded one, of outputs and all gradients."""
    tensors = [normal(shape, i, device) for i, shape in enumerate(case.shapes)]

    def cut(leaves: list[Tensor]) -> list[Tensor]:
        rows = [
            distpatch.shard(t, group, bounds=bounds_of(t.shape[-2], group.size(), seed)) for t in leaves[: case.sharded]
        ]
        return rows + leaves[case.sharded :]

    expected, got = _run(case.fn, tensors, list), _run(case.fn, tensors, cut)
    return max(difference(a, b) for a, b in zip(got, expected, strict=True))


def _run(fn: Callable[..., Any], tensors: list[Tensor], cut: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
    """Results with and without autograd, and gradients."""
    with torch.no_grad():
        quick = _outputs(fn(*cut([t.clone() for t in tensors])))
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = _outputs(fn(*cut(leaves)))
    sum((out * normal(out.shape, 7 + i, out.device)).sum() for i, out in enumerate(outputs)).backward()  # type: ignore[union-attr]
    return [*quick, *(out.detach() for out in outputs), *(t.grad for t in leaves if t.grad is not None)]


def _outputs(result: Any) -> list[Tensor]:
    return [distpatch.gather(t) for t in (result if isinstance(result, tuple) else (result,))]


def difference(value: Tensor, right: Tensor) -> float:
    """Over the largest value; infinite where it is not a number."""
    if value.shape != right.shape:
        return float("inf")
    if right.numel() == 0:
        return 0.0
    error = ((value.to(right.dtype) - right).abs().max() / right.abs().max().clamp_min(1e-30)).item()
    return float("inf") if math.isnan(error) else error


@dataclass(frozen=True)
class Net:
    """A net with its inputs, of which images are sharded on entry."""

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    entry: str = "forward"

    def inputs(self, device: torch.device, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [normal(shape, i, device, dtype) for i, shape in enumerate(self.shapes)]


NETS = (
    Net("SD decoder", lambda: SdDecoder((8, 8, 16), blocks=1, groups=4), ((1, 4, 7, 5),), "decode"),
    Net("Wan decoder", lambda: WanDecoder(4, (2, 2, 1), 4), ((1, 4, 3, 6, 4),), "decode"),
    Net("U-Net", lambda: UNet((8, 16), 1, 4, 2, 4, 6), ((2, 4, 14, 10), (2,), (2, 5, 6))),
)


def net_error(net: Net, group: Any, device: torch.device, *, train: bool, splits: int | str = 3) -> float:
    """Of a converted net: its outputs; with ``train`` also the gradients of inputs and weights, else without any."""
    plain = seeded(net.build).to(device, torch.float64)
    own = distpatch.convert_model(copy.deepcopy(plain), group, splits=splits, fallback="error")
    inputs = [[t.requires_grad_(train and t.ndim > 1) for t in net.inputs(device)] for _ in range(2)]
    with torch.set_grad_enabled(train):
        outputs = [getattr(model, net.entry)(*given) for model, given in zip((own, plain), inputs, strict=True)]
    worst = difference(outputs[0].detach(), outputs[1].detach())
    if train:
        for out in outputs:
            (out * normal(out.shape, 9, device)).sum().backward()
        given = zip((*inputs[0], *own.parameters()), (*inputs[1], *plain.parameters()), strict=True)
        pairs = [(mine.grad, right.grad) for mine, right in given if right.requires_grad]
        largest = max(float(right.abs().max()) for _, right in pairs)  # some are zero but for rounding
        worst = max(worst, *(float((mine - right).abs().max()) / largest for mine, right in pairs))
    return worst


def denoised(net: Net, group: Any, device: torch.device, policy: str, steps: int = 4) -> list[Tensor]:
    """The images of a short denoising loop with displaced steps."""
    own = distpatch.convert_model(seeded(net.build).to(device, torch.float64), group, fallback="error")
    x, *given = net.inputs(device)
    images = []
    with torch.no_grad(), distpatch.displaced(own, policy=policy, warmup_steps=1):
        for _ in range(steps):
            x = x - 0.2 * own(x, *given)
            images.append(x)
    return images
