"""What the tests of the command share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder, as ``save_pretrained`` writes it, in a pipeline's place, and latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )
    vae.save_pretrained(path / "vae")
    np.save(path / "latents.npy", torch.randn(1, 4, 9, 6).numpy())
    return path
