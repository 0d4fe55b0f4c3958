"""What four processes train at once: data x rows, with what people who train put around a model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import distpatch
from tests.support.oracle import random_tensor

BATCH, HEIGHT, STEPS = 4, 9, 5
Options = dict[str, Any]


def _kept(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


CONVOLUTIONS_KEPT = partial(create_selective_checkpoint_contexts, _kept)


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, stride, 1, bias=norm == "group")
        self.norm = nn.GroupNorm(2, out) if norm == "group" else nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Blocks, a branch that sees the whole picture as one pixel, and a convolution that the root of FSDP2 keeps."""

    def __init__(self, norm: str, pooled: str, recompute: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(3, 8, 2, norm), Block(8, 8, 1, norm)])
        self.pooled = Block(8, 8, 1, pooled)
        self.out = nn.Conv2d(8, 3, 1)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.block(block, x)
        return self.out(x + self.block(self.pooled, nn.functional.adaptive_avg_pool2d(x, 1)))

    def block(self, block: nn.Module, x: Tensor) -> Tensor:
        if not self.recompute:
            return block(x)
        if self.recompute == "selective":
            return checkpoint(block, x, use_reentrant=False, context_fn=CONVOLUTIONS_KEPT)
        return checkpoint(block, x, use_reentrant=self.recompute == "reentrant")


def net(options: Options) -> Net:
    model = Net(options.get("norm", "group"), options.get("pooled", "group"), options.get("recompute", "")).double()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = random_tensor(tuple(parameter.shape), seed) / 3
    return model


def optimize(model: Any, call: Any, share: slice, options: Options, averaged: Any = None) -> list[float]:
    """Train; the norms of the gradients. ``parts``: of the batch, whose gradients are added up in each step."""
    images, targets = random_tensor((BATCH, 3, HEIGHT, 6), 1)[share], random_tensor((BATCH, 3, 5, 3), 2)[share]
    images.requires_grad_()  # else a reentrant checkpoint has no gradients
    kinds = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
    optimizer = kinds[options.get("optimizer", "AdamW")](model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=options.get("scaler", False))
    parts, norms = options.get("parts", 1), []
    for step in range(STEPS):
        for part in range(parts):
            with unsynchronized(call, part < parts - 1):
                some = slice(part, None, parts)
                loss = (call(images[some] + step / 4) - targets[some]).square().mean() / parts
                scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.get("clip", float("inf")))
        norms.append(getattr(norm, "full_tensor", lambda: norm)().item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if averaged is not None:
            averaged.update_parameters(model)
    return norms


@contextlib.contextmanager
def unsynchronized(call: Any, whether: bool) -> Iterator[None]:
    """Gradients stay on the ranks of data parallelism until the last part, as each wrapper has it."""
    if hasattr(call, "set_requires_gradient_sync"):
        call.set_requires_gradient_sync(not whether)
        yield
    elif whether and hasattr(call, "no_sync"):
        with call.no_sync():
            yield
    else:
        yield


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def one_process(options: Options) -> tuple[dict[str, Tensor], list[float]]:
    model = net(options)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8)) if options.get("average") else None
    norms = optimize(model, model, slice(None), options, averaged)
    return {**model.state_dict(), **(averaged.state_dict(prefix="averaged.") if averaged else {})}, norms


def across(mesh: DeviceMesh, whole_mesh: DeviceMesh, options: Options) -> tuple[dict[str, Tensor], list[float]]:
    """The state after training on a mesh, and the norms. ``wrap``: "ddp" (``over``: "data" or "all" ranks) or "fsdp",
    before or after the conversion (``order``), ``over`` "data", "rows", "both" (HSDP) or "all" as one axis."""
    model: Any = net(options)
    names, data = list(model.state_dict()), mesh["data"].get_local_rank()
    over = {"data": mesh["data"], "rows": mesh["rows"], "both": mesh, "all": whole_mesh}[options.get("over", "data")]
    wrap, order = options.get("wrap", ""), options.get("order", "before")
    all_of_batch = not wrap or options.get("over") == "rows"
    share = slice(None) if all_of_batch else slice(data * BATCH // 2, (data + 1) * BATCH // 2)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8)) if options.get("average") else None
    if options.get("sync"):
        groups = {"data": mesh["data"].get_group(), "all": None}
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, groups[options["sync"]])

    def sharded() -> None:
        how = {"mesh": over, "reshard_after_forward": options.get("reshard", True)}
        for block in (*model.blocks, model.pooled):
            fully_shard(block, **how)
        fully_shard(model, **how)

    if wrap == "fsdp" and order == "before":
        sharded()
    distpatch.convert_model(model, whole_mesh if not wrap else mesh["rows"], fallback="error")
    if wrap == "fsdp" and order == "after":
        sharded()
    call = DistributedDataParallel(model, process_group=over.get_group()) if wrap == "ddp" else model
    norms = optimize(model, call, share, options, averaged)
    state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    assert list(state) == names, "names in the state dict"
    distpatch.restore_model(model)
    if averaged is not None:
        state.update(averaged.state_dict(prefix="averaged."))
    return copy.deepcopy(state), norms


def trained(rank: int, cases: dict[str, Options]) -> dict[str, tuple[dict[str, Tensor], list[float]]]:
    """All cases, one after the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "rows"))
    whole_mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    results = {}
    with sync_batch_norm_on_cpus():
        for name, options in cases.items():
            try:
                results[name] = across(mesh, whole_mesh, options)
            except Exception as error:
                error.add_note(f"in the case {name!r} on rank {dist.get_rank()}")
                raise
    return results


@contextlib.contextmanager
def sync_batch_norm_on_cpus() -> Iterator[None]:
    """torch refuses SyncBatchNorm there by the name of the device: it has no kernels, which distpatch does not need."""
    forward = nn.SyncBatchNorm.forward

    def on_any_device(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        with mock.patch.object(torch._C, "_get_privateuse1_backend_name", lambda: "cpu"):
            return forward(self, x)

    with (
        mock.patch.object(nn.SyncBatchNorm, "forward", on_any_device),
        mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None),
    ):
        yield


def of_a_mean(rank: int) -> str:
    """SyncBatchNorm over all ranks, of what all hold alike."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Net("group", "batch", "").double())
    distpatch.convert_model(model, dist.group.WORLD)
    with sync_batch_norm_on_cpus():
        try:
            model(random_tensor((BATCH, 3, HEIGHT, 6)))
        except distpatch.UnsupportedOpError as error:
            return str(error)
    return "no error"
