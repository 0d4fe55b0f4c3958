"""A training step on a volume that does not fit: plain, then by distpatch, both with the same address space.

    python -m torch.distributed.run --nproc_per_node=2 -m tests.launch.limited_training BUDGET_MIB WEIGHTS

The budget is what ``limited_decode.py`` says.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import distpatch
from distpatch import launch
from tests.launch.limited_decode import MIB, address_space, limited

CHANNELS, SHAPE = 16, (1, 1, 48, 96, 96)  # 27 MiB for 16 channels


def build() -> nn.Module:
    torch.manual_seed(0)
    c = CHANNELS
    body = [layer for _ in range(2) for layer in (nn.Conv3d(c, c, 3, padding=1), nn.GroupNorm(4, c), nn.SiLU())]
    return nn.Sequential(nn.Conv3d(1, c, 3, padding=1), *body, nn.Conv3d(c, 1, 1))


def draw() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def step(net: nn.Module, volume: Tensor) -> None:
    net.zero_grad()
    (net(volume) - volume).square().mean().backward()
    with torch.no_grad():
        for weight in net.parameters():
            assert weight.grad is not None
            weight.sub_(0.1 * weight.grad)


def main(budget_mib: int, path: str) -> None:
    torch.set_num_threads(1)
    with launch.process_group(device="cpu") as (group, _):
        net, volume = build(), draw()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        few_rows = volume[:, :, :, :8].clone()
        step(net, few_rows)  # what a process needs once: kernels, libraries, the group's threads
        step(distpatch.convert_model(net, group), few_rows)
        distpatch.restore_model(net)
        net.load_state_dict(before)
        limit = address_space() + budget_mib * MIB
        try:
            with limited(limit):
                step(net, volume)
            print("plain: fits", flush=True)
        except RuntimeError as error:
            print(f"plain: {error}".splitlines()[0], flush=True)
        distpatch.convert_model(net, group, output="shard")
        rows = distpatch.shard(volume, group)
        with limited(limit):
            step(net, rows)
        print("distpatch: fits", flush=True)
        if group.rank() == 0:
            torch.save(distpatch.restore_model(net).state_dict(), path)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
