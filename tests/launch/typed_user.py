"""A program of a user's, as a type checker sees it; the last line is wrong on purpose."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import distpatch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


net = distpatch.convert_model(Net(), splits=4, output="shard")
assert_type(net, Net)
x = distpatch.shard(torch.ones(1, 3, 8, 8), None)
assert_type(x, distpatch.PatchTensor)
with distpatch.trace() as t:
    net(x)
assert_type(t, distpatch.Trace)
assert_type(t.table(), str)
assert_type(distpatch.plan(net, x, world_size=8), distpatch.Plan)
assert_type(x.local, Tensor)
assert_type(distpatch.patch_conv2d(x, x, splits=2), Tensor)


@distpatch.register_pointwise
def double(x: Tensor) -> Tensor:
    return x * 2


assert_type(double(x), Tensor)
with distpatch.local_group(2) as ranks:
    assert_type(ranks, distpatch.LocalGroup)
distpatch.convert_model(net, splitz=4)
