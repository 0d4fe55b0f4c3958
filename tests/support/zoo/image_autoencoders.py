"""The autoencoders of diffusers for images, small."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.zoo.autoencoder import (
    Autoencoder,
    decode,
    encode,
    forward,
    sampled,
    seeded_decode,
)


def _kl(levels: int = 4) -> dict[str, Any]:
    return {
        "block_out_channels": (4, 8, 8, 8)[:levels],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 4,
    }


_DC = {
    "latent_channels": 4,
    "attention_head_dim": 2,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
}
IMAGES = {
    "AutoencoderKL": Autoencoder("AutoencoderKL", _kl(), (3, 16), (4, 3), 8),
    "AsymmetricAutoencoderKL": Autoencoder(
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (4, 8),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (4, 8),
            "norm_num_groups": 2,
        },
        (3, 8),
        (4, 4),
        2,
    ),
    "AutoencoderKLTemporalDecoder": Autoencoder(
        "AutoencoderKLTemporalDecoder",
        {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
        (3, 16),
        (4, 8),
        2,
        calls={
            "encode": encode,
            "decode": lambda model, z: model.decode(z.repeat(3, 1, 1, 1), num_frames=3),
            "forward": lambda model, x: model(x.repeat(2, 1, 1, 1), num_frames=2),
        },
    ),
    "AutoencoderKLFlux2": Autoencoder(
        "AutoencoderKLFlux2", {**_kl(), "decoder_block_out_channels": (4, 4, 4, 8)}, (3, 16), (4, 3), 8
    ),
    "AutoencoderTiny": Autoencoder(
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8),
            "num_encoder_blocks": (1, 1, 1),
            "num_decoder_blocks": (1, 1, 1),
        },
        (3, 8),
        (4, 3),
        4,
        calls={"encode": encode, "decode": decode, "forward": forward},
        dtype=torch.float32,
    ),
    "VQModel": Autoencoder(
        "VQModel",
        {**_kl(2), "latent_channels": 3, "num_vq_embeddings": 16},
        (3, 8),
        (3, 4),
        2,
        calls={"encode": encode, "decode": decode, "forward": forward},
    ),
    "VQModel, spatial norm": Autoencoder(
        "VQModel",
        {
            **_kl(2),
            "latent_channels": 4,
            "num_vq_embeddings": 16,
            "norm_type": "spatial",
            "vq_embed_dim": 4,
            "norm_num_groups": 32,
            "block_out_channels": (32, 32),
        },
        (3, 8),
        (4, 4),
        2,
        calls={"encode": encode, "decode": decode, "forward": forward},
    ),
    "AutoencoderDC": Autoencoder(
        "AutoencoderDC",
        _DC,
        (3, 6),
        (4, 3),
        2,
        calls={"encode": encode, "decode": decode, "forward": forward},
    ),
    "AutoencoderDC, convolutional resampling": Autoencoder(
        "AutoencoderDC",
        {
            **_DC,
            "upsample_block_type": "interpolate",
            "downsample_block_type": "conv",
            "encoder_out_shortcut": False,
            "decoder_in_shortcut": False,
        },
        (3, 6),
        (4, 3),
        2,
        calls={"encode": encode, "decode": decode, "forward": forward},
    ),
    "ConsistencyDecoderVAE": Autoencoder(
        "ConsistencyDecoderVAE",
        {
            "encoder_block_out_channels": (4, 8, 8, 8),
            "encoder_layers_per_block": 1,
            "encoder_norm_num_groups": 2,
            "decoder_block_out_channels": (8, 8, 8, 8),
            "decoder_layers_per_block": 1,
            "decoder_norm_num_groups": 2,
        },
        (3, 8),
        (4, 1),
        8,
        calls={"encode": encode, "decode": seeded_decode, "forward": sampled},
    ),
    "AutoencoderRAE": Autoencoder(
        "AutoencoderRAE",
        {
            "encoder_type": "mae",
            "encoder_hidden_size": 64,
            "encoder_num_hidden_layers": 1,
            "encoder_patch_size": 8,
            "encoder_input_size": 32,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
            "patch_size": 4,
        },
        (3, 32),
        (64, 4),
        8,
        calls={"encode": encode, "decode": decode, "forward": forward},
    ),
    "AutoencoderKLKVAE": Autoencoder(
        "AutoencoderKLKVAE",
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1, 1)},
        (3, 8),
        (4, 2),
        4,
    ),
    "AutoencoderKLHunyuanImage": Autoencoder(
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (32, 32, 32),
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "sample_size": 16,
        },
        (3, 32),
        (4, 8),
        4,
    ),
}
