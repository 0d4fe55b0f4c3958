"""Train a 3-D segmentation net on a mesh of data × rows: each pair of ranks shares volumes, each pair has its own.

    python torchrun_examples/train_segmentation.py --out one                               # one process, not converted
    torchrun --nproc_per_node=4 torchrun_examples/train_segmentation.py --out four --beside one
    torchrun --nproc_per_node=4 torchrun_examples/train_segmentation.py --out first --steps 20
    torchrun --nproc_per_node=2 torchrun_examples/train_segmentation.py --out second --resume first --beside one

The volumes are blobs of scikit-image under noise, made once and read by each rank from its rows on. ``OUT`` gets the
losses, their plot, and a checkpoint, which any number of ranks can go on from.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from skimage.data import binary_blobs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import distpatch
from distpatch import launch

MIB = 1 << 20
VOLUMES, SIDE, BATCH = 16, 32, 4  # of all ranks together
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def block(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(channels, out, 3, padding=1), nn.GroupNorm(4, out), nn.SiLU())


class UNet(nn.Module):
    """(B, 1, D, H, W) to the logits of the blobs, of the same shape."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first, self.second = block(1, channels), block(2 * channels, 2 * channels)
        self.down = nn.Conv3d(channels, 2 * channels, 3, stride=2, padding=1)
        self.last = nn.Sequential(block(3 * channels, channels), nn.Conv3d(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        coarse = self.second(self.down(fine))
        logits: Tensor = self.last(torch.cat([fine, F.interpolate(coarse, size=fine.shape[2:])], 1))
        return logits


def make_volumes(folder: Path) -> None:
    """Files of (D, H, W): volumes in which the blobs are to be found, and where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(VOLUMES):
        blobs = binary_blobs(SIDE, blob_size_fraction=0.3, n_dim=3, volume_fraction=0.3, rng=index)
        noise = np.random.default_rng(index).normal(size=blobs.shape)
        np.save(folder / f"{index}.npy", (blobs + 0.7 * noise).astype("float32"))
        np.save(folder / f"{index}-blobs.npy", blobs.astype("float32"))


def batches(folder: Path, mesh: DeviceMesh, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Volumes and blobs, (B, 1, D, H, W), from this step on: of the ranks of a rows group the same, each its rows."""
    rows, data = mesh["rows"].get_group(), mesh["data"]
    sources = [(folder / f"{index}.npy", folder / f"{index}-blobs.npy") for index in range(VOLUMES)]
    dataset = distpatch.ShardedDataset(sources, rows, pattern="d h w -> 1 d h w")
    sampler: Any = DistributedSampler(dataset, num_replicas=data.size(), rank=data.get_local_rank(), seed=0)
    loader = DataLoader(dataset, BATCH // data.size(), sampler=sampler, collate_fn=dataset.collate)
    for epoch in itertools.count(step // len(loader)):
        sampler.set_epoch(epoch)
        for volume, blobs in itertools.islice(loader, step % len(loader), None):
            step += 1
            yield (volume.shard(rows), blobs.shard(rows)) if mesh.size() > 1 else (volume.rows, blobs.rows)


def train(mesh: DeviceMesh, volumes: Path, steps: int, resume: Path | None, out: Path) -> tuple[list[float], int]:
    """The losses of all steps so far, and the most bytes that a step's tensors took on this rank at once."""
    torch.manual_seed(0)
    model = UNet()
    if mesh.size() > 1:
        distpatch.convert_model(model, mesh["rows"], output="shard")
        fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[float] = []
    if resume is not None:
        weights, moments = get_state_dict(model, optimizer)
        load({"model": weights, "optimizer": moments}, checkpoint_id=resume / "checkpoint")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        losses = json.loads((resume / "losses.json").read_text())
    peak_bytes = 0
    for volume, blobs in itertools.islice(batches(volumes, mesh, len(losses)), steps - len(losses)):
        with distpatch.trace(measure=True) as trace:
            loss = F.binary_cross_entropy_with_logits(model(volume), blobs)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        peak_bytes = max(peak_bytes, trace.peak_bytes or 0)
        mean = loss.detach() / mesh["data"].size()
        dist.all_reduce(mean, group=mesh["data"].get_group())
        losses.append(mean.item())
    weights, moments = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": moments}, checkpoint_id=out / "checkpoint")
    return losses, peak_bytes


def plot(losses: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(losses.items(), ("-", "--")):
        axes.plot(range(1, len(values) + 1), values, style, label=name)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=150)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of the losses, their plot and the checkpoint.")],
    rows: Annotated[int, typer.Option(min=1, help="Ranks that share a volume; the others have others.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="In all, also those before a checkpoint.")] = 40,
    resume: Annotated[Path | None, typer.Option(help="OUT of the run to go on from.")] = None,
    beside: Annotated[Path | None, typer.Option(help="OUT of a run to compare the losses with.")] = None,
) -> None:
    with launch.process_group(device="cpu") as (group, device):
        shape = (group.size() // rows, rows) if group.size() > 1 else (1, 1)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "rows"))
        volumes = out / "volumes"
        launch.on_rank0(group, lambda: make_volumes(volumes))
        losses, peak_bytes = train(mesh, volumes, steps, resume, out)
        peaks: list[Any] = [None] * group.size()
        dist.all_gather_object(peaks, peak_bytes)
        if group.rank() > 0:
            return
        name = f"{shape[0]} x {shape[1]} ranks" if group.size() > 1 else "one process"
        (out / "losses.json").write_text(json.dumps(losses))
        runs = {name if resume is None else f"{name}, from the checkpoint of {resume.name} on": losses}
        print(f"{name}: loss {losses[0]:.6f} to {losses[-1]:.6f} in {len(losses)} steps")
        for rank, most in enumerate(peaks):
            print(f"rank {rank}: at most {most / MIB:.1f} MiB of tensors in a step")
        if beside is not None:
            runs[beside.name] = json.loads((beside / "losses.json").read_text())
            difference = max(abs(a - b) for a, b in zip(losses, runs[beside.name], strict=True))
            print(f"Largest difference from {beside.name}: {difference:.1e}")
        plot(runs, out / "losses.png")


if __name__ == "__main__":
    app()
