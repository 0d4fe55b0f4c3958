"""The transformers of diffusers that take tokens (B, N, C), small: an odd number of tokens."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.zoo.transformer import Transformer, mask, rand

GRID = (7, 5)  # of image tokens
N = 35
IMAGE_IDS = torch.cartesian_prod(torch.arange(1), torch.arange(7), torch.arange(5), torch.arange(1)).double()
TEXT_IDS = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(5)).double()
BY_IDS = {"shard": {"hidden_states": 1, "img_ids": 0}}
BY_TOKENS = {"shard": {"hidden_states": 1}}
MIDDLE = torch.tensor([0.3, 0.7])


def tokens(channels: int = 4, count: int = N) -> Any:
    return rand(2, count, channels)


def text(width: int = 8) -> Any:
    return rand(2, 5, width)


_FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": [4, 4, 8],
}
_FLUX_INPUTS = {
    "hidden_states": tokens(),
    "encoder_hidden_states": text(),
    "img_ids": IMAGE_IDS[:, :3],
    "txt_ids": TEXT_IDS[:, 1:],
    "timestep": MIDDLE,
}
_POOLED = {"pooled_projections": rand(2, 6)}
_FLUX2_INPUTS = {**_FLUX_INPUTS, "img_ids": IMAGE_IDS.expand(2, -1, -1), "txt_ids": TEXT_IDS.expand(2, -1, -1)}
_QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": (8, 4, 4),
}
_QWEN_INPUTS = {
    "hidden_states": tokens(16),
    "encoder_hidden_states": text(),
    "encoder_hidden_states_mask": mask(2, 5),
    "timestep": MIDDLE,
    "img_shapes": [[(1, 7, 5)]] * 2,
}
_LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 8,
}
_LTX_INPUTS = {
    "hidden_states": tokens(4, 70),
    "encoder_hidden_states": text(),
    "timestep": torch.tensor([3, 7]),
    "encoder_attention_mask": mask(2, 5),
    "num_frames": 2,
    "height": 7,
    "width": 5,
}
_LTX2 = {
    **_LTX,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "rope_double_precision": False,
}


def _packed_ids(text_tokens: int) -> torch.Tensor:
    """Positions (t, h, w) of so many text tokens and of the grid of image tokens."""
    ids = torch.zeros(text_tokens + N, 3)
    ids[:text_tokens] = torch.arange(text_tokens)[:, None].float()
    ids[text_tokens:, 1:] = IMAGE_IDS[:, 1:3].float()
    return ids


def _h3_positions() -> torch.Tensor:
    ids = _packed_ids(4 + 6)
    ids[:, 0] = torch.arange(len(ids))
    return ids


TOKENS = {
    "FluxTransformer2DModel": Transformer(
        "FluxTransformer2DModel", {**_FLUX, "pooled_projection_dim": 6}, {**_FLUX_INPUTS, **_POOLED}
    ),
    "FluxTransformer2DModel, text replicated": Transformer(
        "FluxTransformer2DModel", {**_FLUX, "pooled_projection_dim": 6}, {**_FLUX_INPUTS, **_POOLED}, BY_IDS
    ),
    "Flux2Transformer2DModel": Transformer(
        "Flux2Transformer2DModel",
        {**_FLUX, "axes_dims_rope": [4, 4, 4, 4], "timestep_guidance_channels": 16},
        {**_FLUX2_INPUTS, "guidance": MIDDLE},
    ),
    "Flux3Transformer2DModel": Transformer(
        "Flux3Transformer2DModel",
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        {
            **_FLUX_INPUTS,
            "img_ids": IMAGE_IDS,
            "txt_ids": TEXT_IDS,
            "image_cond_hidden_states": rand(2, 7, 4),
            "image_cond_ids": IMAGE_IDS[:7],
        },
        BY_IDS,
    ),
    "ChromaTransformer2DModel": Transformer(
        "ChromaTransformer2DModel",
        {**_FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        {**_FLUX_INPUTS, "attention_mask": mask(2, 40)},
        BY_IDS,
    ),
    "BriaTransformer2DModel": Transformer(
        "BriaTransformer2DModel",
        {**_FLUX, "attention_head_dim": 8, "pooled_projection_dim": None, "axes_dims_rope": [0, 4, 4]},
        _FLUX_INPUTS,
        BY_IDS,
    ),
    "BriaFiboTransformer2DModel": Transformer(
        "BriaFiboTransformer2DModel",
        {
            **_FLUX,
            "attention_head_dim": 8,
            "joint_attention_dim": 16,
            "text_encoder_dim": 8,
            "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4],
        },
        {**_FLUX_INPUTS, "encoder_hidden_states": text(16), "text_encoder_layers": [text(), text()]},
        BY_IDS,
    ),
    "LongCatImageTransformer2DModel": Transformer(
        "LongCatImageTransformer2DModel", {**_FLUX, "pooled_projection_dim": 6}, _FLUX_INPUTS, BY_IDS
    ),
    "OvisImageTransformer2DModel": Transformer(
        "OvisImageTransformer2DModel", {**_FLUX, "out_channels": 4}, _FLUX_INPUTS, BY_IDS
    ),
    "QwenImageTransformer2DModel": Transformer("QwenImageTransformer2DModel", _QWEN, _QWEN_INPUTS),
    "NucleusMoEImageTransformer2DModel": Transformer(
        "NucleusMoEImageTransformer2DModel",
        {**_QWEN, "moe_enabled": False, "capacity_factors": [8.0, 8.0]},
        {**_QWEN_INPUTS, "img_shapes": [(1, 7, 5)] * 2},
        BY_TOKENS,
    ),
    "NucleusMoEImageTransformer2DModel, experts": Transformer(
        "NucleusMoEImageTransformer2DModel",
        {
            **_QWEN,
            "num_layers": 3,
            "moe_enabled": True,
            "num_experts": 2,
            "moe_intermediate_dim": 16,
            "capacity_factors": [1.0] * 3,
            "dense_moe_strategy": "leave_first_block_dense",
        },
        {**_QWEN_INPUTS, "img_shapes": [(1, 7, 5)] * 2},
        BY_TOKENS,
    ),
    "QwenImage21Transformer2DModel": Transformer(
        "QwenImage21Transformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 8,
            "axes_dims_rope": (4, 6, 6),
        },
        {
            "hidden_states": tokens(16, 24),
            "encoder_hidden_states": text(),
            "timestep": MIDDLE[:1],
            "img_shapes": [[(1, 6, 4)]] * 2,
            "img_mask": torch.tensor([[False] * 5 + [True] * 6] * 2),
            "encoder_hidden_states_mask": mask(2, 5),
        },
        BY_TOKENS,
    ),
    "LTXVideoTransformer3DModel": Transformer("LTXVideoTransformer3DModel", _LTX, _LTX_INPUTS),
    "LTX2VideoTransformer3DModel": Transformer(
        "LTX2VideoTransformer3DModel",
        _LTX2,
        {
            **_LTX_INPUTS,
            "timestep": torch.tensor([300.0, 700.0]),
            "audio_hidden_states": rand(2, 9, 4),
            "audio_encoder_hidden_states": text(),
            "audio_num_frames": 9,
            "fps": 25.0,
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Transformer(
        "SanaWMLTX2RefinerTransformer3DModel",
        {**_LTX2, "use_prompt_embeddings": True},
        {
            "hidden_states": tokens(4),
            "encoder_hidden_states": text(),
            "timestep": torch.arange(70.0).view(2, 35),
            "video_rotary_emb": (rand(1, 35, 16), rand(1, 35, 16)),
            "encoder_attention_mask": mask(2, 5),
        },
        {"shard": {"hidden_states": 1, "timestep": 1, "video_rotary_emb": 1}},
    ),
    "Ideogram4Transformer2DModel": Transformer(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 8,
            "rope_theta": 10_000,
            "mrope_section": (2, 1, 1),
        },
        {
            "hidden_states": tokens(4, 40),
            "encoder_hidden_states": rand(2, 40, 8),
            "timestep": MIDDLE,
            "position_ids": _packed_ids(5).long().expand(2, -1, -1),
            "segment_ids": torch.ones(2, 40, dtype=torch.long),
            "indicator": torch.tensor([[3] * 5 + [2] * 35] * 2),
        },
        {"shard": {"hidden_states": 1, "encoder_hidden_states": 1}},
        dtype=torch.float32,
    ),
    "Krea2Transformer2DModel": Transformer(
        "Krea2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
            "rope_theta": 1000.0,
        },
        {
            "hidden_states": tokens(),
            "encoder_hidden_states": rand(2, 5, 3, 16),
            "timestep": MIDDLE,
            "position_ids": _packed_ids(5),
            "encoder_attention_mask": mask(2, 5),
        },
        BY_TOKENS,
    ),
    "MiniMaxH3Transformer3DModel": Transformer(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 6,
            "patch_size": (1, 2, 2),
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        {
            "hidden_states": tokens(16),
            "audio_hidden_states": rand(2, 6, 6),
            "encoder_hidden_states": rand(2, 4, 8),
            "timestep": MIDDLE,
            "timestep_indices": torch.tensor([0] * 4 + [1] * 6 + [0] * N),
            "token_tags": torch.tensor([1] * 4 + [2] * 6 + [0] * N),
            "position_ids": _h3_positions(),
            "video_indices": torch.arange(10, 45),
            "audio_indices": torch.arange(4, 10),
            "text_indices": torch.arange(4),
        },
    ),
    "Cosmos3OmniTransformer": Transformer(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 6,
            "hidden_act": "relu2",
            "hidden_size": 12,
            "intermediate_size": 24,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "qk_norm_for_text": False,
            "rope_axes_dim": [1, 1, 1],
            "rope_theta": 1e8,
            "vocab_size": 32,
        },
        {
            "input_ids": torch.tensor([1, 2]),
            "text_indexes": torch.tensor([0, 1]),
            "position_ids": torch.arange(37).expand(3, -1),
            "und_len": 2,
            "sequence_length": 37,
            "vision_tokens": [rand(1, 2, 1, 7, 5)],
            "vision_token_shapes": [(1, 7, 5)],
            "vision_sequence_indexes": torch.arange(2, 37),
            "vision_mse_loss_indexes": torch.arange(2, 37),
            "vision_timesteps": torch.ones(35),
            "vision_noisy_frame_indexes": [torch.tensor([0])],
        },
        dtype=torch.float32,
    ),
    "AceStepTransformer1DModel": Transformer(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "patch_size": 2,
            "rope_theta": 10000.0,
            "sliding_window": 4,
        },
        {
            "hidden_states": rand(2, 14, 8),
            "timestep": MIDDLE,
            "timestep_r": MIDDLE / 2,
            "encoder_hidden_states": rand(2, 5, 32),
            "context_latents": rand(2, 14, 16),
        },
        {"shard": {"hidden_states": 1, "context_latents": 1}},
    ),
    "LongCatAudioDiTTransformer": Transformer(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 8, "latent_dim": 4, "text_conv": False},
        {
            "hidden_states": tokens(),
            "encoder_hidden_states": text(),
            "encoder_attention_mask": mask(2, 5),
            "attention_mask": mask(2, N),
            "timestep": MIDDLE,
        },
        BY_TOKENS,
    ),
    "MiniMaxMusic3Transformer1DModel": Transformer(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        {"hidden_states": rand(2, 8, N), "encoder_hidden_states": rand(2, N, 16), "timestep": MIDDLE},
        {"shard": {"hidden_states": 2, "encoder_hidden_states": 1}},
    ),
    "MiniMaxMusic3RVQDepthDecoder": Transformer(
        "MiniMaxMusic3RVQDepthDecoder",
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "audio_vocab_size": 24,
            "num_codebooks": 8,
            "max_position_embeddings": 16,
        },
        {"inputs_embeds": rand(2, 7, 16)},
        {"shard": {"inputs_embeds": 1}},
    ),
    "StableAudioDiTModel": Transformer(
        "StableAudioDiTModel",
        {
            "sample_size": N,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "out_channels": 4,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        {
            "hidden_states": rand(2, 4, N),
            "timestep": MIDDLE,
            "encoder_hidden_states": text(),
            "global_hidden_states": rand(2, 1, 8),
            "rotary_embedding": (rand(N + 1, 4), rand(N + 1, 4)),
        },
        {"shard": {"hidden_states": 2}},
    ),
    "StableAudio3DiTModel": Transformer(
        "StableAudio3DiTModel",
        {
            "io_channels": 8,
            "patch_size": 1,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "cond_token_dim": 8,
            "global_cond_dim": 12,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2,
            "num_memory_tokens": 3,
            "use_differential_attention": False,
        },
        {
            "hidden_states": rand(2, 8, N),
            "timestep": MIDDLE,
            "encoder_hidden_states": text(),
            "global_hidden_states": rand(2, 12),
        },
        {"shard": {"hidden_states": 2}},
    ),
    "T5FilmDecoder": Transformer(
        "T5FilmDecoder",
        {
            "input_dims": 4,
            "targets_length": N,
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 32,
        },
        {
            "encodings_and_masks": [(rand(2, 5, 16), torch.ones(2, 5)), (rand(2, 7, 16), torch.ones(2, 7))],
            "decoder_input_tokens": tokens(),
            "decoder_noise_time": MIDDLE,
        },
        {"shard": {"decoder_input_tokens": 1}},
    ),
}
