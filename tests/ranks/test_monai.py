"""MONAI's nets by an inferer of whole volumes: what the net itself gives, which sliding windows do not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import DynUNet, SegResNet
from torch import nn

import distpatch
from distpatch.model.convert import is_converted
from distpatch.monai import WholeInferer
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks

VOLUME = random_tensor((1, 1, 40, 24, 16))
STRIDES = [1, 2, 2]
NETS: dict[str, Any] = {
    "SegResNet": lambda: SegResNet(3, 8, 1, 3, blocks_down=(1, 1), blocks_up=(1,)),
    "DynUNet": lambda: DynUNet(3, 1, 3, [3] * 3, STRIDES, STRIDES[1:], filters=[8, 16, 24]),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = NETS[name]().double().eval()
    return net


@pytest.mark.parametrize("dim", [-2, -3])
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_whole_volume(name: str, dim: int) -> None:
    model = build(name)
    right = model(VOLUME)
    windows = SlidingWindowInferer((24, 24, 16), overlap=0.5, mode="gaussian")(VOLUME, model)
    assert (windows - right).abs().max() > 1e-3 * right.abs().max()

    def body(rank: int) -> None:
        with torch.no_grad():
            net = copy.deepcopy(model)
            inferer = WholeInferer(dist.group.WORLD, dim=dim, fallback="error")
            for _ in range(2):
                torch.testing.assert_close(inferer(VOLUME, net), right, rtol=1e-10, atol=1e-10)
            inferer.restore()
            assert not is_converted(net)
            labels = WholeInferer(dist.group.WORLD, labels=True, dim=dim, fallback="error")
            with distpatch.trace() as seen:
                found = labels(MetaTensor(VOLUME, meta={"spacing": 2}), net)
            assert torch.equal(torch.as_tensor(found), right.argmax(1, keepdim=True))
            whole = inferer(VOLUME, net)  # of a net that the other one has converted
            assert type(whole) is torch.Tensor
            torch.testing.assert_close(whole, right, rtol=1e-10, atol=1e-10)
            sent = sum(traffic.sent_bytes for traffic in seen.traffic() if traffic.op in {"gather", "output"})
            assert 0 < sent < found.numel() * found.element_size(), "labels are gathered, not logits"

    run_ranks(2, body)


def test_on_one_device_and_refused() -> None:
    net = build("SegResNet")
    with torch.no_grad():
        right = net(VOLUME)
        torch.testing.assert_close(WholeInferer(splits=2)(VOLUME, net), right, rtol=1e-10, atol=1e-10)
        distpatch.restore_model(net)
        assert torch.equal(WholeInferer(labels=True)(VOLUME, net), right.argmax(1, keepdim=True))
    with pytest.raises(TypeError, match="nn.Module, to be converted; got function"):
        WholeInferer()(VOLUME, lambda x: x)
    with pytest.raises(ValueError, match="no choice of output"):
        WholeInferer(output="rank0")
