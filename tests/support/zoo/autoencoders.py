"""Every spatial autoencoder of diffusers in a small config, with random weights, and inputs by height.

How they are run and compared stands in autoencoder_runs.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models import autoencoders
from torch import Tensor, nn

from tests.support.oracle import random_tensor

# Of diffusers.models.autoencoders, what has no image rows: sound, and the coordinates of proteins.
NOT_SPATIAL = {
    *("AutoencoderKLKVAEAudio", "AutoencoderKLLTX2Audio", "AutoencoderKLMiniMaxH3Audio", "AutoencoderOobleck"),
    *("AutoencoderSAME", "Cosmos3AVAEAudioTokenizer", "LongCatAudioDiTVae", "MMAudioVAE", "MMAudioVocoder"),
    *("MiniMaxMusic3Vocoder", "RFD4ProteinaAutoencoder"),
}

Call = Callable[[Any, Tensor], Any]


def _encode(model: Any, x: Tensor) -> Any:
    return model.encode(x)


def _decode(model: Any, z: Tensor) -> Any:
    return model.decode(z)


def _forward(model: Any, x: Tensor) -> Any:
    return model(x)


def _sampled(model: Any, x: Tensor) -> Any:
    """The forward of a KL autoencoder, its latents drawn from the posterior."""
    return model(x, sample_posterior=True, generator=torch.Generator().manual_seed(7))


def _seeded_decode(model: Any, z: Tensor) -> Any:
    return model.decode(z, generator=torch.Generator().manual_seed(7))


def _seeded_forward(model: Any, z: Tensor) -> Any:
    return model(z, generator=torch.Generator().manual_seed(7))


def _with_time(model: Any, z: Tensor) -> Any:
    return model.decode(z, torch.tensor([0.05] * z.shape[0], dtype=z.dtype))


def _with_time_forward(model: Any, x: Tensor) -> Any:
    return model(x, temb=torch.tensor([0.05] * x.shape[0], dtype=x.dtype))


@dataclass(frozen=True)
class Autoencoder:
    """``image`` and ``latent``: shapes without batch and rows, (channels, frames…, columns); ``scale``: rows of the
    image for one of the latent. ``options``: attributes set on the model. ``dtype``: what it can compute in."""

    cls: str
    config: dict[str, Any]
    image: tuple[int, ...]
    latent: tuple[int, ...]
    scale: int
    calls: dict[str, Call] = field(default_factory=lambda: {"encode": _encode, "decode": _decode, "forward": _sampled})
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The same weights on every call; those that begin as zeros or ones are none here."""
        torch.manual_seed(0)
        model: nn.Module = getattr(autoencoders, self.cls)(**self.config).to(dtype or self.dtype).eval()
        with torch.no_grad():
            for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
                parameter.add_(0.05 * random_tensor(tuple(parameter.shape), index).to(parameter.dtype))
        for name, value in self.options.items():
            setattr(model, name, value)
        return model

    def input(self, call: str, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        shape = self.latent if call == "decode" else self.image
        return random_tensor((1, *shape[:-1], rows, shape[-1]), seed=rows, dtype=dtype or self.dtype)

    def candidates(self, call: str) -> tuple[int, ...]:
        """Even and odd multiples of the scale, heights between them, fewer latent rows than ranks."""
        if call == "decode" or self.scale == 1:
            return (6, 5, 4, 3, 2, 1)
        return (*(n * self.scale for n in (4, 3, 2, 1)), 3 * self.scale - 1, 5 * self.scale // 2)


def spatial_classes() -> Iterator[str]:
    for name, cls in vars(autoencoders).items():
        if inspect.isclass(cls) and name not in NOT_SPATIAL:
            yield name


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
_WAN = {
    "base_dim": 16,
    "z_dim": 4,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
_LTX = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
}
_HUNYUAN15 = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
    "downsample_match_channel": False,
    "upsample_match_channel": False,
}

AUTOENCODERS: dict[str, Autoencoder] = {
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
            "encode": _encode,
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
        calls={"encode": _encode, "decode": _decode, "forward": _forward},
        dtype=torch.float32,
    ),
    "VQModel": Autoencoder(
        "VQModel",
        {**_kl(2), "latent_channels": 3, "num_vq_embeddings": 16},
        (3, 8),
        (3, 4),
        2,
        calls={"encode": _encode, "decode": _decode, "forward": _forward},
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
        calls={"encode": _encode, "decode": _decode, "forward": _forward},
    ),
    "AutoencoderDC": Autoencoder(
        "AutoencoderDC",
        _DC,
        (3, 6),
        (4, 3),
        2,
        calls={"encode": _encode, "decode": _decode, "forward": _forward},
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
        calls={"encode": _encode, "decode": _decode, "forward": _forward},
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
        calls={"encode": _encode, "decode": _seeded_decode, "forward": _sampled},
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
        calls={"encode": _encode, "decode": _decode, "forward": _forward},
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
    "AutoencoderKLHunyuanImageRefiner": Autoencoder(
        "AutoencoderKLHunyuanImageRefiner", _HUNYUAN15, (3, 3, 8), (4, 2, 2), 4
    ),
    "AutoencoderKLHunyuanVideo15": Autoencoder("AutoencoderKLHunyuanVideo15", _HUNYUAN15, (3, 3, 8), (4, 2, 2), 4),
    "AutoencoderKLHunyuanVideo": Autoencoder(
        "AutoencoderKLHunyuanVideo",
        {
            "latent_channels": 4,
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
        (3, 5, 32),
        (4, 2, 4),
        8,
    ),
    "AutoencoderKLCogVideoX": Autoencoder(
        "AutoencoderKLCogVideoX",
        {"block_out_channels": (4, 4, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2},
        (3, 9, 8),
        (4, 5, 2),
        8,
    ),
    "AutoencoderKLAllegro": Autoencoder(
        "AutoencoderKLAllegro",
        {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2},
        (3, 8, 16),
        (4, 2, 2),
        8,
        options={"use_tiling": True, "kernel": (8, 16, 16), "stride": (8, 8, 8)},
    ),
    "AutoencoderKLCosmos": Autoencoder(
        "AutoencoderKLCosmos",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (4, 4, 8, 8),
            "decode_block_out_channels": (4, 4, 8, 8),
            "attention_resolutions": (8,),
            "resolution": 64,
            "num_layers": 1,
        },
        (3, 9, 16),
        (4, 2, 2),
        8,
    ),
    "AutoencoderKLLTXVideo": Autoencoder("AutoencoderKLLTXVideo", _LTX, (3, 9, 32), (8, 2, 2), 32),
    "AutoencoderKLLTXVideo 0.9.5": Autoencoder(
        "AutoencoderKLLTXVideo",
        {
            **_LTX,
            "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
            "spatio_temporal_scaling": (True, True, True, True),
            "block_out_channels": (8,) * 5,
            "decoder_block_out_channels": (8, 16, 32),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "decoder_spatio_temporal_scaling": (True, True, True),
            "decoder_inject_noise": (True, True, True, False),
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            "upsample_residual": (True, True, True),
            "upsample_factor": (2, 2, 2),
            "timestep_conditioning": True,
        },
        (3, 9, 32),
        (8, 2, 2),
        32,
        calls={"encode": _encode, "decode": _with_time, "forward": _with_time_forward},
    ),
    "AutoencoderKLLTX2Video": Autoencoder(
        "AutoencoderKLLTX2Video",
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 16),
            "decoder_block_out_channels": (8, 16, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1),
        },
        (3, 9, 64),
        (8, 2, 2),
        32,
    ),
    "LTX2VideoDiffusionDecoderModel": Autoencoder(
        "LTX2VideoDiffusionDecoderModel",
        {
            "latent_channels": 4,
            "decoder_head_dim": 8,
            "decoder_stage_channels": (8, 8, 8),
            "decoder_stage_depths": (1, 1, 1),
            "decoder_stage_kernels": ((3, 3, 3), (3, 3, 3)),
            "decoder_upsample_strides": ((1, 2, 2), (2, 1, 1)),
            "decoder_upsample_channel_reductions": (1, 1),
            "decoder_stage5_kernel": (3, 5, 5),
            "decoder_t_emb_dim": 8,
            "temporal_compression_ratio": 2,
            "spatial_compression_ratio": 8,
        },
        (4, 2, 3),
        (4, 2, 3),
        1,
        calls={"decode": _seeded_decode, "forward": _seeded_forward},
    ),
    "AutoencoderKLMagvit": Autoencoder(
        "AutoencoderKLMagvit",
        {
            "block_out_channels": (4, 4, 8, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "down_block_types": ("SpatialDownBlock3D", "SpatialTemporalDownBlock3D") * 2,
            "up_block_types": ("SpatialUpBlock3D", "SpatialTemporalUpBlock3D") * 2,
        },
        (3, 5, 16),
        (4, 2, 2),
        8,
    ),
    "AutoencoderKLMagvit, whole group norm": Autoencoder(
        "AutoencoderKLMagvit",
        {
            "block_out_channels": (4, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "down_block_types": ("SpatialDownBlock3D", "SpatialTemporalDownBlock3D"),
            "up_block_types": ("SpatialUpBlock3D", "SpatialTemporalUpBlock3D"),
            "spatial_group_norm": False,
        },
        (3, 5, 8),
        (4, 2, 2),
        2,
    ),
    "AutoencoderKLMiniMaxH3": Autoencoder(
        "AutoencoderKLMiniMaxH3",
        {
            "latent_channels": 4,
            "block_out_channels": (4, 4, 8),
            "layers_per_block": 1,
            "spatial_downsample_factors": (2, 2, 1),
            "temporal_downsample_factors": (2, 2, 1),
            "norm_num_groups": 2,
            "decoder_num_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_attention_head_dim": 8,
            "decoder_num_register_tokens": 2,
            "latents_mean": (0.0,) * 4,
            "latents_std": (1.0,) * 4,
        },
        (3, 22, 16),
        (4, 7, 4),
        4,
        options={"use_tiling": False},
    ),
    "AutoencoderKLMochi": Autoencoder(
        "AutoencoderKLMochi",
        {
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "latent_channels": 4,
            "layers_per_block": (1, 1, 1, 1, 1),
            "latents_mean": (0.0,) * 4,
            "latents_std": (1.0,) * 4,
        },
        (3, 7, 16),
        (4, 2, 2),
        8,
    ),
    "AutoencoderKLQwenImage": Autoencoder("AutoencoderKLQwenImage", _WAN, (3, 1, 16), (4, 1, 2), 8),
    "AutoencoderKLQwenImage21": Autoencoder(
        "AutoencoderKLQwenImage21",
        {**_WAN, "decoder_base_dim": 4, "dim_mult": [1, 1, 2, 2], "temperal_downsample": [False, True, True]},
        (4, 1, 16),
        (4, 1, 2),
        8,
    ),
    "AutoencoderKLWan": Autoencoder("AutoencoderKLWan", _WAN, (3, 9, 16), (4, 3, 2), 8),
    "AutoencoderKLWan 2.2": Autoencoder(
        "AutoencoderKLWan",
        {
            **_WAN,
            "decoder_base_dim": 4,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
        (3, 5, 32),
        (4, 2, 2),
        16,
    ),
    "AutoencoderKLKVAEVideo": Autoencoder(
        "AutoencoderKLKVAEVideo",
        {"ch": 64, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2},
        (3, 5, 8),
        (4, 3, 2),
        4,
    ),
    "Kandinsky6SRVAE": Autoencoder(
        "Kandinsky6SRVAE",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (4, 8, 16),
            "decoder_block_out_channels": (4, 8, 16),
            "layers_per_block": 1,
            "temporal_compression_ratio": 2,
        },
        (3, 19, 8),
        (4, 10, 2),
        4,
    ),
    "AutoencoderVidTok": Autoencoder(
        "AutoencoderVidTok",
        {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        (3, 5, 16),
        (4, 2, 2),
        8,
        calls={"encode": _encode, "decode": _decode, "forward": _forward},
    ),
    "AutoencoderVidTok, FSQ, not causal": Autoencoder(
        "AutoencoderVidTok",
        {
            "ch": 32,
            "ch_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "is_causal": False,
            "regularizer": "fsq",
            "double_z": False,
            "codebook_size": 512,
            "z_channels": 3,
        },
        (3, 16, 16),
        (3, 4, 2),
        8,
        calls={"encode": _encode, "decode": _decode, "forward": _forward},
    ),
}
