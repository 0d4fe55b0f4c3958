"""A volume through a net of MONAI: exactly, by all ranks, and in sliding windows, which are not exact.

    pip install monai
    torchrun --nproc_per_node=2 torchrun_examples/segment_volume.py

The net has random weights, and the volume is noise: what is compared is the arithmetic.
"""

from __future__ import annotations

import time

import torch
from monai.inferers.inferer import SlidingWindowInferer
from monai.networks.nets.segresnet import SegResNet

from distpatch import launch
from distpatch.monai import WholeInferer

SIDE, WINDOW = 96, 64


@torch.no_grad()
def main() -> None:
    with launch.process_group(device="cpu") as (group, _):
        torch.manual_seed(0)
        net = SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=3).eval()
        volume = torch.randn(1, 1, SIDE, SIDE, SIDE)
        right = net(volume)
        windows = SlidingWindowInferer(WINDOW, overlap=0.5, mode="gaussian")(volume, net)
        started = time.perf_counter()
        whole = WholeInferer(group, dim=-3)(volume, net)
        seconds = time.perf_counter() - started
        if group.rank() == 0:
            for name, found in ((f"{group.size()} ranks", whole), (f"windows of {WINDOW}^3", windows)):
                difference = (found - right).abs().max() / right.abs().max()
                other = (found.argmax(1) != right.argmax(1)).double().mean()
                print(f"{name}: differs from net(volume) by {difference:.1e} of the largest, {other:.2%} other labels")
            print(f"the whole volume on {group.size()} ranks: {seconds:.1f} s, with the conversion and its first plans")


if __name__ == "__main__":
    main()
