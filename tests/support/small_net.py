"""A net with a bit of everything that cares who owns which rows, run forward and backward on converted copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import run_ranks

Values = dict[str, Any]


class SmallNet(nn.Module):
    """Strides, a norm of all rows with buffers, attention-like sums, a resize, a dropout's draws, a crop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.down = nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.norm, self.group = nn.BatchNorm2d(6), nn.GroupNorm(2, 4)
        self.up, self.last = nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        y = F.silu(self.first(x))
        z = F.relu(self.norm(self.down(y)))
        up = self.up(z * torch.sigmoid(z.mean((2, 3), keepdim=True)))
        up = F.interpolate(up, size=y.shape[-2:], mode="bilinear", align_corners=False)
        image = self.last(self.group(y + up)).flip(-2) * scale
        return {"image": image, "tokens": image.flatten(2).transpose(1, 2), "mean": image.mean((2, 3))}


def run(model: Any, rows: int, calls: int = 1) -> list[Values]:
    """Of each call: outputs, gradients of the input and all parameters, buffers; and an inference."""
    found = []
    for number in range(calls):
        x = random_tensor((2, 3, rows, 6), seed=number)
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        outputs = model(leaf)
        loss = sum((out * random_tensor(tuple(out.shape), seed=i)).sum() for i, out in enumerate(outputs.values()))
        assert isinstance(loss, Tensor)
        loss.backward()
        values = {name: distpatch.gather(out).detach() for name, out in outputs.items()}
        values["input's gradient"] = leaf.grad
        values |= {f"gradient of {name}": parameter.grad.clone() for name, parameter in model.named_parameters()}
        values |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad():
            values |= {f"{name}, inference": distpatch.gather(out) for name, out in model(x).items()}
        found.append(values)
    return found


def check(rows: int, world: int, calls: int = 1, also: Callable[[Any], None] | None = None, **options: Any) -> None:
    """Every rank has one device's values in every call, to 1e-10. ``also``: what is looked at on each rank then."""
    model = SmallNet().double()
    right = run(copy.deepcopy(model), rows, calls)

    def body(rank: int) -> list[Values]:
        mine = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD, fallback="error", **options)
        found = run(mine, rows, calls)
        if also is not None:
            also(mine)
        return found

    for rank, found in enumerate(run_ranks(world, body, keep=True)):
        for number, (values, expected) in enumerate(zip(found, right, strict=True)):
            assert values.keys() == expected.keys()
            for name, value in values.items():
                where = f"{name} of call {number} on rank {rank} of {world}, {rows} rows"
                assert_same(value, expected[name], 1e-10, where)
