"""accelerate trains a converted model on a mesh of data × rows, which its ``ParallelismConfig`` builds.

    pip install accelerate
    torchrun --nproc_per_node=4 torchrun_examples/train_accelerate.py

Ranks of the axis that accelerate calls context-parallel share the rows of a picture; all ranks average their gradients
(DDP). On GPUs, where accelerate takes a ``parallelism_config`` itself, the mesh is ``accelerator.torch_device_mesh``.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import distpatch


def main() -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    rows = min(ranks, 2)
    accelerator = Accelerator(cpu=True)
    mesh = ParallelismConfig(dp_shard_size=ranks // rows, cp_size=rows).build_device_mesh("cpu") if rows > 1 else None
    set_seed(0)

    clean = F.avg_pool2d(torch.rand(16, 1, 33, 32), 5, 1, 2)  # to be found again under noise
    data = TensorDataset(clean + 0.1 * torch.randn_like(clean), clean)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 1, 3, padding=1))
    distpatch.convert_model(net, mesh and mesh["cp"])
    model, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=3e-3))
    sampler = DistributedSampler(data, ranks // rows, accelerator.process_index // rows, shuffle=False)
    loader = DataLoader(data, batch_size=8 * rows // ranks, sampler=sampler)

    for epoch in range(5):
        total = torch.zeros(())
        for noisy, target in loader:
            loss = F.mse_loss(model(noisy), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() / len(loader)
        accelerator.print(f"epoch {epoch}: mean squared error {accelerator.reduce(total, 'mean'):.5f}")
    accelerator.end_training()
    if dist.is_initialized():  # accelerate leaves it open on CPUs, and gloo's threads then race with the end of Python
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
