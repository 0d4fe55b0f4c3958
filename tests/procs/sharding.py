"""What the pool's processes train: a converted model whose parameters FSDP2 (or DDP) keeps, on a mesh of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import distpatch
from tests.support.oracle import random_tensor

BATCH, HEIGHT, STEPS = 4, 9, 5


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, stride, 1)
        self.norm = nn.GroupNorm(2, out)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Blocks, each a unit of FSDP2, and a convolution that the root keeps; ``encode`` does the same."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(3, 8, 2), Block(8, 8), Block(8, 8)])
        self.out = nn.Conv2d(8, 3, 1)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.out(x)

    def encode(self, x: Tensor) -> Tensor:
        return self(x)


def net(recompute: bool = False, dtype: torch.dtype = torch.float64) -> Net:
    model = Net(recompute).to(dtype)
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random_tensor(tuple(parameter.shape), seed).to(dtype) / 3
    return model


def optimize(
    model: Any, call: Any, share: slice, parts: int = 1, clip: float | None = None, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """The parameters after some steps, of which each is made of ``parts`` of the batch."""
    images = random_tensor((BATCH, 3, HEIGHT, 6), 1)[share].to(dtype)
    targets = random_tensor((BATCH, 3, 5, 3), 2)[share].to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        for image, target in zip(images.chunk(parts), targets.chunk(parts), strict=True):
            ((call(image) - target).square().mean() / parts).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def trained(rank: int, options: dict[str, Any]) -> tuple[list[Tensor], list[str], Tensor]:
    """Parameters after training, names in the state dict, and what the restored model makes of an image.

    ``mesh``: "rows" (one axis, rows and parameters), or of two axes, on which FSDP2 keeps its parts: "data" (over it,
    each with its part of the batch), "hsdp" (rows in parts, data copies), "over rows"; ``order``: "before" the
    conversion or "after"; ``ddp``: "around" or "inside" instead.
    """
    dtype = options.get("dtype", torch.float64)
    if options["mesh"] == "rows":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("rows",))
        rows, parts_of, share = mesh, mesh, slice(None)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "rows"))
        rows = mesh["rows"]
        parts_of = {"data": mesh["data"], "hsdp": mesh, "over rows": mesh["rows"]}[options["mesh"]]
        data = mesh["data"].get_local_rank()
        share = slice(None) if options["mesh"] == "over rows" else slice(data * BATCH // 2, (data + 1) * BATCH // 2)
    model: Any = net(options.get("recompute", False), dtype)
    names = list(model.state_dict())

    def shard() -> None:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if options.get("mixed") else MixedPrecisionPolicy()
        how = {"mesh": parts_of, "reshard_after_forward": options.get("reshard", True), "mp_policy": policy}
        for block in model.blocks:
            fully_shard(block, **how)
        fully_shard(model, **how)
        if entry == "encode":
            register_fsdp_forward_method(model, "encode")

    entry, ddp = options.get("entry", "forward"), options.get("ddp")
    if ddp == "inside":
        for parent, name in [(model.blocks, str(i)) for i in range(len(model.blocks))] + [(model, "out")]:
            setattr(parent, name, DistributedDataParallel(getattr(parent, name), process_group=parts_of.get_group()))
    if not ddp and options["order"] == "before":
        shard()
    distpatch.convert_model(model, rows, fallback="error")
    if not ddp and options["order"] == "after":
        shard()
    call: Any = model.encode if entry == "encode" else model
    if ddp == "around":
        call = DistributedDataParallel(model, process_group=parts_of.get_group())
    parameters = optimize(model, call, share, options.get("parts", 1), options.get("clip"), dtype)
    assert ddp == "inside" or list(model.state_dict()) == names
    distpatch.restore_model(model)
    with torch.no_grad():
        return parameters, names, model(random_tensor((1, 3, HEIGHT, 6)).to(dtype)).double()


def tensor_parallel(rank: int) -> str:
    """What is said of a DTensor that nothing gathers."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.data, mesh, [Shard(0)]))
    distpatch.convert_model(model, mesh)
    try:
        model(torch.ones(1, 3, 8, 4))
    except distpatch.UnsupportedOpError as error:
        return str(error)
    return "no error"
