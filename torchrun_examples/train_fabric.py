"""Lightning Fabric trains a converted model on a mesh of data × rows: ``ModelParallelStrategy`` takes its two axes.

    pip install lightning
    torchrun --nproc_per_node=4 torchrun_examples/train_fabric.py

Pairs of ranks share the rows of a picture (the axis that Fabric calls tensor-parallel), and each pair has pictures of
its own. ``fully_shard`` keeps a part of the weights on each rank.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric, seed_everything
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import distpatch


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    distpatch.convert_model(model, mesh["tensor_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def main() -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    rows = min(ranks, 2)
    strategy = ModelParallelStrategy(parallelize, data_parallel_size=ranks // rows, tensor_parallel_size=rows)
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=ranks)
    fabric.launch()
    seed_everything(0, verbose=False)

    clean = F.avg_pool2d(torch.rand(16, 1, 33, 32), 5, 1, 2)  # to be found again under noise
    data = TensorDataset(clean + 0.1 * torch.randn_like(clean), clean)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 1, 3, padding=1))
    model = fabric.setup_module(net)
    optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), lr=3e-3))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=8 * rows // ranks))

    for epoch in range(5):
        total = torch.zeros(())
        for noisy, target in loader:
            loss = F.mse_loss(model(noisy), target)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() / len(loader)
        fabric.print(f"epoch {epoch}: mean squared error {fabric.all_reduce(total):.5f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
