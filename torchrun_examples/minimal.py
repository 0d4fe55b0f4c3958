"""The smallest program: one convolution over all ranks.  torchrun --nproc_per_node=2 torchrun_examples/minimal.py"""

import torch
import torch.distributed as dist

import distpatch

dist.init_process_group("gloo")  # on GPUs: "nccl", torch.cuda.set_device, and .cuda() behind the model and the picture
torch.manual_seed(0)  # plain tensors are the same on every rank, weights too
model = torch.nn.Conv2d(3, 8, kernel_size=3, padding=1)
picture = torch.randn(1, 3, 101, 64)
alone = model(picture)
distpatch.convert_model(model, dist.group.WORLD)
difference = (model(picture) - alone).abs().max().item()  # each rank convolved its rows, and has the whole result
print(f"rank {dist.get_rank()}: largest difference from one device {difference:.1e}")
dist.destroy_process_group()
