"""Nets and filters of libraries that were not written with distpatch in mind: the rows of ``benchmarks.foreign``.

Each entry builds its net when it is run, small and with random weights. What a library offers in many variants is
here once: of timm one net of each of its model files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Foreign:
    """``build`` gives a net; ``shapes``: of its inputs, the first of them images; ``call`` what is compared.

    ``double``: in fp64, which a net that holds complex weights of its own cannot.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Any] = lambda model, *inputs: model(*inputs)
    double: bool = True


class Call(nn.Module):
    """A function as a module, so that it can be converted."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


# One net of each model file of timm, the smallest but for test models; without the four largest.
TIMM = """
vit_tiny_patch16_224 repvgg_a0 beit_base_patch16_224 halo2botnet50ts_256 poolformerv2_s12 cait_xxs24_224 coat_tiny
coatnet_pico_rw_224 convit_tiny convmixer_768_32 convnext_atto cpubone_nano crossvit_tiny_240 cs3darknet_focus_s csatv2
cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121 dla46x_c eca_nfnet_l0 dpn48b ese_vovnet19b_slim_dw resnet10t
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mobilenetv2_035 efficientvim_m1 efficientvit_b0
efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 mobilenetv3_small_050 focalnet_tiny_srf
gcvit_xxtiny ghostnet_050 gmlp_ti16_224 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small
iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18
legacy_xception levit_128s lowformer_b0 mambaout_femto mobilevit_xxs mvitv2_tiny nasnetalarge nest_tiny nextvit_small
pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50
resnest14d resnetv2_18 rexnet_100 samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 vit_relpos_small_patch16_224
tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_r_s16_p8_224
vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p8_224
""".split()


def _timm(name: str) -> Foreign:
    """A dense feature extractor: maps of all stages where timm makes them, else the last features."""

    def build() -> nn.Module:
        import timm

        try:
            return timm.create_model(name, features_only=True)
        except (RuntimeError, AttributeError, TypeError, AssertionError, ValueError):
            return timm.create_model(name, num_classes=0, global_pool="")

    def shape() -> tuple[int, ...]:
        import timm

        config = timm.get_pretrained_cfg(name)
        fixed = config.fixed_input_size if config else True
        return (1, 3, *((config.input_size[1:] if config else (224, 224)) if fixed else (160, 128)))

    return Foreign("timm", name, build, (shape(),))


def timm_nets() -> list[Foreign]:
    return [_timm(name) for name in TIMM]


def kornia_filters() -> list[Foreign]:
    import kornia.filters as kf

    image, volume = (2, 3, 21, 16), (1, 2, 9, 11, 10)
    kernel = torch.rand(1, 3, 5)
    motion = {"kernel_size": 5, "angle": 35.0, "direction": 0.5}
    calls: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
        "bilateral_blur": (lambda x: kf.bilateral_blur(x, (3, 5), 0.1, (1.5, 1.5)), (image,)),
        "joint_bilateral_blur": (lambda x, g: kf.joint_bilateral_blur(x, g, (3, 3), 0.1, (1.5, 1.5)), (image, image)),
        "blur_pool2d": (lambda x: kf.blur_pool2d(x, 3), (image,)),
        "max_blur_pool2d": (lambda x: kf.max_blur_pool2d(x, 3), (image,)),
        "edge_aware_blur_pool2d": (lambda x: kf.edge_aware_blur_pool2d(x.sigmoid(), 3), (image,)),
        "box_blur": (lambda x: kf.box_blur(x, (3, 5)), (image,)),
        "box_blur, separable": (lambda x: kf.box_blur(x, (5, 3), separable=True), (image,)),
        "canny": (lambda x: kf.canny(x.sigmoid()), (image,)),
        "filter2d, same": (lambda x: kf.filter2d(x, kernel.to(x)), (image,)),
        "filter2d, valid": (lambda x: kf.filter2d(x, kernel.to(x), padding="valid"), (image,)),
        "filter2d_separable": (
            lambda x: kf.filter2d_separable(x, torch.ones(1, 3).to(x), torch.ones(1, 5).to(x)),
            (image,),
        ),
        "filter3d": (lambda x: kf.filter3d(x, torch.ones(1, 3, 3, 3).to(x)), (volume,)),
        "fft_conv": (lambda x: kf.fft_conv(x, kernel.to(x)), (image,)),
        "gaussian_blur2d": (lambda x: kf.gaussian_blur2d(x, (5, 5), (1.5, 1.0)), (image,)),
        "guided_blur": (lambda x, g: kf.guided_blur(g, x, 3, 0.1), (image, image)),
        "in_range": (lambda x: kf.in_range(x, (0.2, 0.2, 0.2), (0.8, 0.8, 0.8), return_mask=True), (image,)),
        "laplacian": (lambda x: kf.laplacian(x, 3), (image,)),
        "median_blur": (lambda x: kf.median_blur(x, (3, 5)), (image,)),
        "motion_blur": (lambda x: kf.motion_blur(x, **motion), (image,)),
        "motion_blur3d": (lambda x: kf.motion_blur3d(x, 3, (10.0, 20.0, 30.0), 0.5), (volume,)),
        "otsu_threshold": (lambda x: kf.otsu_threshold(x.sigmoid() * 255)[0], (image,)),
        "sobel": (kf.sobel, (image,)),
        "spatial_gradient": (lambda x: kf.spatial_gradient(x, order=2), (image,)),
        "spatial_gradient3d": (kf.spatial_gradient3d, (volume,)),
        "unsharp_mask": (lambda x: kf.unsharp_mask(x, (3, 3), (1.5, 1.5)), (image,)),
    }
    return [Foreign("kornia", name, lambda call=call: Call(call), shapes) for name, (call, shapes) in calls.items()]


def compression_nets() -> list[Foreign]:
    from compressai.zoo import image_models

    def build(name: str) -> Callable[[], nn.Module]:
        return lambda: image_models[name](quality=1, pretrained=False)

    def decoded(model: nn.Module, x: Tensor) -> Any:
        out = model(x)
        return out["x_hat"], *out["likelihoods"].values()

    return [Foreign("compressai", name, build(name), ((1, 3, 128, 64),), decoded) for name in sorted(image_models)]


def operator_nets() -> list[Foreign]:
    import neuralop.models as no

    def made(name: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(no, name)(in_channels=2, out_channels=1, hidden_channels=8, **options)

    shape = (2, 2, 20, 16)
    uno = {
        "uno_out_channels": [8, 8, 8],
        "uno_n_modes": [[6, 6]] * 3,
        "uno_scalings": [[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]],
        "n_layers": 3,
        "channel_mlp_skip": "linear",
    }
    nets = {
        "FNO": (made("FNO", n_modes=(6, 6)), shape),
        "FNO, group norm": (made("FNO", n_modes=(6, 6), norm="group_norm"), shape),
        "TFNO": (made("TFNO", n_modes=(6, 6)), shape),
        "FNO 3-D": (made("FNO", n_modes=(4, 4, 4)), (1, 2, 8, 10, 8)),
        "UNO": (made("UNO", **uno), shape),
    }
    return [Foreign("neuralop", name, build, (shape,), double=False) for name, (build, shape) in nets.items()]


def earth_nets() -> list[Foreign]:
    import torchgeo.models as tg

    def siamese(name: str) -> Callable[[], nn.Module]:
        return lambda: getattr(tg, name)(encoder_name="resnet18", encoder_weights=None)

    pair = (1, 2, 3, 64, 64)
    nets: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "FCN": (lambda: tg.FCN(3, 4, 8), (1, 3, 21, 16)),
        "RCF": (lambda: tg.RCF(3, 8, 3, mode="gaussian"), (1, 3, 21, 16)),
        "FarSeg": (lambda: tg.FarSeg("resnet18", 4, False), (1, 3, 96, 64)),
        "ChangeStarFarSeg": (lambda: tg.ChangeStarFarSeg("resnet18", 3, False), pair),
        "FCSiamConc": (siamese("FCSiamConc"), pair),
        "FCSiamDiff": (siamese("FCSiamDiff"), pair),
        "ConvLSTM": (lambda: tg.ConvLSTM(3, [4, 4], 3, 2), (1, 3, 3, 16, 12)),
        "BTC": (lambda: tg.BTC("swin_tiny"), (1, 6, 64, 64)),
        "ChangeViT": (lambda: tg.ChangeViT("vit_tiny_patch16_224"), (1, 2, 3, 256, 256)),
    }
    return [Foreign("torchgeo", name, build, (shape,)) for name, (build, shape) in nets.items()]


def segmentation_nets() -> list[Foreign]:
    import segmentation_models_pytorch as smp

    names = "DeepLabV3 DeepLabV3Plus FPN Linknet MAnet PAN PSPNet Segformer UPerNet Unet UnetPlusPlus DPT".split()
    encoder = {"DPT": "tu-vit_tiny_patch16_224"}

    def build(name: str) -> Callable[[], nn.Module]:
        options = {"dynamic_img_size": True} if name == "DPT" else {}
        return lambda: getattr(smp, name)(encoder.get(name, "resnet18"), encoder_weights=None, classes=3, **options)

    return [Foreign("segmentation_models_pytorch", name, build(name), ((1, 3, 192, 128),)) for name in names]


LIBRARIES: dict[str, Callable[[], list[Foreign]]] = {
    "timm": timm_nets,
    "kornia": kornia_filters,
    "compressai": compression_nets,
    "neuralop": operator_nets,
    "torchgeo": earth_nets,
    "segmentation_models_pytorch": segmentation_nets,
}
