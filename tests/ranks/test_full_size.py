"""Autoencoders of their real size, on fake tensors: the same rules, no fallback, and a rank's share of the activations.

Ranks that do not exist, one at an edge and one in the middle, are run on their own: what they would be sent has
a known shape.
"""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import distpatch
from distpatch.comm.simulated import SimulatedCommunicator
from distpatch.lazy.row_patches import chosen_by
from distpatch.profiling.op_costs import representatives

# Default constructor arguments; latents of 720 × 1280 in 21 frames, 512² and 256² in 9, 2048², 1024².
LATENTS = {
    "AutoencoderKLWan": (1, 16, 6, 90, 160),
    "AutoencoderKLHunyuanVideo": (1, 16, 3, 64, 64),
    "AutoencoderKLCogVideoX": (1, 16, 3, 32, 32),
    "AutoencoderDC": (1, 32, 64, 64),
    "AutoencoderKLFlux2": (1, 32, 128, 128),
}


def planned(name: str, size: int, rank: int) -> distpatch.Plan:
    with torch.device("meta"):
        model, latents = getattr(diffusers, name)().eval(), torch.empty(LATENTS[name])
    options = {"output": "shard", "fallback": "error"}
    return distpatch.plan(model, latents, method="decode", world_size=size, ranks=[rank], device="cpu", options=options)


@pytest.mark.slow
@pytest.mark.parametrize("name", LATENTS)
def test_share_of_a_rank(name: str) -> None:
    alone = planned(name, 1, 0)
    assert alone.peak_bytes > 1 << 30  # it is the real size
    for rank, size in ((0, 2), (3, 8)):
        plan = planned(name, size, rank)
        share = plan.peak_bytes / alone.peak_bytes
        assert share <= 1.1 / size, f"{share * size:.3f} times an even share on rank {rank} of {size}"
        assert plan.replicated_share == 0
        assert plan.flops <= 1.25 * alone.flops, "rows at seams are computed twice, and no others"


@pytest.mark.slow
def test_unet_of_sdxl() -> None:
    """The U-Net of SDXL for a picture of 1024²: nothing is gathered but keys and values."""
    with FakeTensorMode(), torch.no_grad(), chosen_by(representatives):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ).eval()
        distpatch.convert_model(unet, SimulatedCommunicator(1, 4), output="shard", fallback="error")
        added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        out = unet(torch.empty(2, 4, 128, 128), 3, torch.empty(2, 77, 2048), added_cond_kwargs=added).sample
        assert isinstance(out, distpatch.PatchTensor) and out.local.shape == (2, 4, 32, 128)
