"""Transformers of libraries, as they are, that segment, restore, detect and denoise; and restoration nets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.zoo import restoration
from tests.support.zoo.nets import TIMES, Net, diffusers, monai, sample

STAGES = ["stage1", "stage2", "stage3", "stage4"]
PYRAMID = {"depths": [1] * 4, "hidden_sizes": [4, 8, 8, 8], "num_attention_heads": [1, 2, 2, 2], "mlp_ratios": [2] * 4}
SWIN = (
    "SwinConfig",
    {"embed_dim": 8, "depths": [2, 2, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 3, "out_features": STAGES},
)
RESNET = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "layer_type": "basic"}
DETECTOR = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
}


def transformers(name: str, config: str, *, backbone: tuple[str, dict[str, Any]] | None = None, **options: Any) -> Any:
    def build() -> nn.Module:
        library = pytest.importorskip("transformers")
        inner = {} if backbone is None else {"backbone_config": getattr(library, backbone[0])(**backbone[1])}
        return getattr(library, name)(getattr(library, config)(**inner, **options))

    return build


def logits(model: Any, x: Tensor) -> Tensor:
    return model(pixel_values=x).logits


def masks(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    result = model(pixel_values=x)
    return result.masks_queries_logits, result.class_queries_logits


TRANSFORMERS = {
    "UNETR": Net(
        "monai",
        monai("UNETR", 1, 2, (80, 32), feature_size=4, hidden_size=8, mlp_dim=8, num_heads=2, spatial_dims=2),
        ((1, 1, 80, 32),),
    ),
    "SwinUNETR, windows of a batch": Net(
        "monai",
        monai(
            "SwinUNETR", 1, 2, depths=(2, 2, 1, 1), num_heads=(1, 2, 2, 2), window_size=3, feature_size=12, spatial_dims=2
        ),
        ((2, 1, 96, 32),),
    ),
    "SegFormer": Net(
        "transformers",
        transformers("SegformerForSemanticSegmentation", "SegformerConfig", decoder_hidden_size=8, **PYRAMID),
        ((2, 3, 71, 64),),
        logits,
    ),
    "Swin2SR": Net(
        "transformers",
        transformers(
            "Swin2SRForImageSuperResolution",
            "Swin2SRConfig",
            image_size=15,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=3,
            upscale=2,
        ),
        ((2, 3, 21, 15),),
        lambda model, x: model(pixel_values=x).reconstruction,
    ),
    "UPerNet on Swin": Net(
        "transformers",
        transformers(
            "UperNetForSemanticSegmentation",
            "UperNetConfig",
            backbone=SWIN,
            hidden_size=8,
            auxiliary_in_channels=32,
            auxiliary_channels=8,
        ),
        ((2, 3, 75, 49),),
        logits,
    ),
    "Mask2Former, deformable attention": Net(
        "transformers",
        transformers(
            "Mask2FormerForUniversalSegmentation",
            "Mask2FormerConfig",
            backbone=SWIN,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=16,
            dim_feedforward=16,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=4,
            num_queries=5,
            dropout=0.0,
        ),
        ((1, 3, 95, 64),),
        masks,
    ),
    "RT-DETR, the best of all tokens": Net(
        "transformers",
        transformers(
            "RTDetrForObjectDetection",
            "RTDetrConfig",
            backbone=("RTDetrResNetConfig", {**RESNET, "out_features": STAGES[1:]}),
            encoder_hidden_dim=16,
            encoder_in_channels=[8] * 3,
            decoder_in_channels=[16] * 3,
            d_model=16,
            num_denoising=0,
            **DETECTOR,
        ),
        ((2, 3, 96, 64),),  # a batch of one has wrong gradients on one device (rules/reductions/normalization.py: _fixed)
        lambda model, x: list(model(pixel_values=x).values())[:2],
    ),
    "EoMT": Net(
        "transformers",
        transformers(
            "EomtForUniversalSegmentation",
            "EomtConfig",
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=80,
            num_queries=5,
            num_blocks=1,
            num_upscale_blocks=1,
            mlp_ratio=2,
        ),
        ((2, 3, 80, 80),),
        masks,
    ),
    "PVTv2": Net(
        "transformers",
        transformers("PvtV2Backbone", "PvtV2Config", sr_ratios=[8, 4, 2, 1], out_features=STAGES, **PYRAMID),
        ((2, 3, 93, 64),),
        lambda model, x: model(x).feature_maps,
    ),
    "MobileViT and its loss": Net(
        "transformers",
        transformers(
            "MobileViTForSemanticSegmentation",
            "MobileViTConfig",
            hidden_sizes=[8] * 3,
            neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 8],
            aspp_out_channels=8,
            num_attention_heads=2,
        ),
        ((2, 3, 93, 64), torch.arange(2 * 93 * 64).view(2, 93, 64) % 2),
        lambda model, x, labels: list(model(x, labels=labels).values())[:2],
    ),
    "SAM 2, windows of several sizes": Net(
        "transformers",
        transformers(
            "Sam2HieraDetModel",
            "Sam2HieraDetConfig",
            hidden_size=8,
            num_attention_heads=1,
            image_size=[96, 64],
            blocks_per_stage=[1, 2, 3, 1],
            embed_dim_per_stage=[8, 16, 32, 64],
            num_attention_heads_per_stage=[1, 2, 2, 2],
            window_size_per_stage=[8, 4, 4, 2],
            global_attention_blocks=[4],
            window_positional_embedding_background_size=[4, 4],
        ),
        ((2, 3, 96, 64),),
        lambda model, x: model(x).last_hidden_state,
    ),
    "SD3": Net(
        "diffusers",
        diffusers(
            "SD3Transformer2DModel",
            sample_size=30,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=6,
            caption_projection_dim=8,
            pooled_projection_dim=6,
            pos_embed_max_size=30,
        ),
        ((2, 4, 30, 22), (2, 5, 6), (2, 6), TIMES),
        sample,
    ),
    "Sana, linear attention": Net(
        "diffusers",
        diffusers(
            "SanaTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=6,
            sample_size=15,
        ),
        ((2, 4, 15, 11), (2, 5, 6), TIMES),
        sample,
        double=True,
    ),
    "DC-AE, EfficientViT blocks": Net(
        "diffusers",
        diffusers(
            "AutoencoderDC",
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
        ),
        ((2, 3, 38, 22),),
        lambda model, x: model.decode(model.encode(x).latent).sample,
        double=True,
    ),
    "Restormer, channel attention": Net("plain", restoration.Restormer, ((2, 3, 19, 14),)),
    "NAFNet, a function of its own": Net("plain", restoration.NAFNet, ((2, 3, 19, 14),)),
    "EDSR": Net("plain", restoration.EDSR, ((2, 3, 17, 14),)),
    "HAT, shifted and overlapping windows": Net("plain", restoration.HAT, ((2, 3, 17, 13),)),
    "DAT, deformable attention": Net("plain", restoration.DAT, ((2, 3, 17, 13),)),
    "LaMa, Fourier convolution": Net("plain", restoration.FourierUnit, ((2, 3, 17, 14),)),
}  # fmt: skip
