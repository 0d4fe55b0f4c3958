"""The three ways of attention planned for FLUX.1 on H100s: the second table of docs/transformers.md. No GPU is used.

    python -m benchmarks.transformers.attention

One double and one single block in their real size, bfloat16, 16,384 image and 512 text tokens, of random weights that
are not even allocated; of the last rank. Nothing of it is measured.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging
from torch import nn

import distpatch

IMAGE, TEXT, MIB = 16_384, 512, 1 << 20
WORLDS, WAYS = (1, 2, 4, 8), ("gather", "ring", "all_to_all")
OF_ATTENTION = "scaled_dot_product_attention"


def flux() -> tuple[nn.Module, dict[str, Any]]:
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1).to(torch.bfloat16).eval()
        half = partial(torch.empty, dtype=torch.bfloat16)
        inputs = {
            "hidden_states": half(1, IMAGE, 64),
            "encoder_hidden_states": half(1, TEXT, 4096),
            "pooled_projections": half(1, 768),
            "timestep": half(1),
            "img_ids": torch.empty(IMAGE, 3),
            "txt_ids": torch.empty(TEXT, 3),
        }
    return model, inputs


def main() -> None:
    logging.set_verbosity_error()
    model, inputs = flux()
    print("| ranks | | peak of activations, MiB | sent for attention, MiB | rounds for attention | time, ms |")
    print("|---|---|---|---|---|---|")
    for world in WORLDS:
        for way in WAYS if world > 1 else WAYS[:1]:
            options = {"shard": {"hidden_states": 1, "img_ids": 0}, "attention": way}
            plan = distpatch.plan(model, world_size=world, ranks=[world - 1], options=options, **inputs)
            rank = plan.ranks[-1]
            traffic = [t for t in rank.trace.traffic() if t.op == OF_ATTENTION]
            sent, rounds = sum(t.sent_bytes for t in traffic), sum(t.rounds for t in traffic)
            assert plan.seconds is not None
            cells = [f"{rank.peak_bytes / MIB:.0f}", f"{sent / MIB:.0f}", f"{rounds}", f"{1e3 * plan.seconds:.1f}"]
            print("|", " | ".join([str(world), way if world > 1 else "", *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
