"""Errors of other systems that shard or tile convolutional models, each as a test that passes here.

Named after the system and the error. Most were silent: a wrong picture, a lost gradient, a wrong shape. Where
more of a case stands elsewhere, a comment says where; the errors of ranks that are missing, late or called
differently are in test_failures.py, groups that are not the world in test_convert.py (``test_groups``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from distpatch import UnsupportedOpError
from tests.support.oracle import H, assert_same, case, random_tensor
from tests.support.threads import rank_outcomes, run_ranks
from tests.support.zoo.models import on_ranks, tiny_kl

X = (2, 3, H, 5)
W3, W4, W2 = (4, 3, 3, 3), (4, 3, 4, 4), (4, 3, 2, 2)
Case = Callable[[], None]


def run_all(cases: dict[str, Case]) -> Callable[[Callable[..., None]], Any]:
    """Parametrise a test by a table of cases."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


def dropped_in_place(x: Tensor) -> Tensor:
    """The result of an in-place call is dropped; the wrapper, and its gradient, must have changed."""
    y = x * 2
    y.mul_(3)
    y += 1
    y[:, :, 1:] *= 2
    return y


SHARD_TENSOR = {
    "pad below and right, then stride 2 without padding (every encoder)": case(
        lambda x, w: F.conv2d(F.pad(x, (0, 1, 0, 1)), w, stride=2), X, W3, heights=(8, 7, 2)
    ),
    "stride 2 on an odd shard": case(lambda x, w: F.conv2d(x, w, stride=2, padding=1), X, W3, heights=(18, 17, 9)),
    "bilinear, align_corners": case(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), X),
    "reshape across the shard": case(lambda x: x.reshape(x.shape[0], -1), X),
    "in place, result dropped": case(dropped_in_place, X),
    "a number from a local partial": case(lambda x: x * float(x.detach().sum()), X),
    "uneven rows lost in a fallback": case(lambda x: torch.renorm(x, 2, 1, 1.0), X, heights=(7, 5), fallback="renorm"),
    "even kernels other than k = s": case(lambda x, w: F.conv2d(x, w, padding=2), X, W4),
    "group norm by the mean of squares": case(lambda x: F.group_norm(x * 0.01 + 1, 3), X),  # see test_precision.py
}


@run_all(SHARD_TENSOR)
def test_shard_tensor(case: Case) -> None:
    case()


DTENSOR = {
    "convolution sharded by height": case(lambda x, w: F.conv2d(x, w, padding=1), X, W3),
    "convolution sharded by width": case(lambda x, w: F.conv2d(x, w, padding=1), (2, 3, 5, H), W3, dim=-1),
    "its backward": case(lambda x, w: F.conv2d(F.conv2d(x, w, padding=1).relu(), w[:3, :1].repeat(1, 4, 1, 1), padding=1), X, W3),
    "pooling": case(lambda x: F.max_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 3, 2, 1), X),
}  # fmt: skip


@run_all(DTENSOR)
def test_dtensor(case: Case) -> None:
    case()


DISTCONV = {
    "norms of the local rows": case(
        lambda x: F.group_norm(x, 3) + F.batch_norm(x, None, None, training=True) + F.instance_norm(x), X, heights=(7, 3)
    ),
    "pools of the local rows": case(lambda x: F.max_pool2d(x, 2, 1) + F.avg_pool2d(x, 2, 1), X, heights=(7, 4)),
    "adaptive pool of the local rows": case(lambda x: F.adaptive_avg_pool2d(x, (3, 2)), X),
    "resizes of the local rows": case(lambda x: F.interpolate(x, size=(9, 4), mode="bicubic"), X),
    "uneven rows": case(lambda x, w: F.conv2d(x, w, padding=1), X, W3, heights=(7, 5, 3)),
}  # fmt: skip


@run_all(DISTCONV)
def test_distconv(case: Case) -> None:
    case()


def conv(kernel: int, **how: Any) -> Case:
    return case(lambda x, w: F.conv2d(x, w, **how), X, (4, 3, kernel, kernel), heights=(9, 8, 5))


DIST_VAE = {
    "k3 without padding: other height": conv(3),
    "k3, padding 2: other height": conv(3, padding=2),
    "k4, padding 1: other height": conv(4, padding=1),
    "k4, padding 2: other height": conv(4, padding=2),
    "dilation": conv(3, padding=2, dilation=2),
    "circular padding": case(lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w), X, W3, heights=(7, 3)),
    "halo wider than a band: some ranks raise, others hang": case(
        lambda x, w: F.conv2d(x, w, padding=6, dilation=6), X, W3, heights=(6, 3, 2)
    ),
    "bands of a multiple of 8": case(
        lambda x, w: F.conv_transpose2d(F.conv2d(x, w, stride=2, padding=1), w, stride=2), X, W3, heights=(12, 11)
    ),
    "fewer rows than ranks": case(lambda x, w: F.conv2d(x, w, padding=1), X, W3, heights=(3, 2, 1)),
}


@run_all(DIST_VAE)
def test_dist_vae(case: Case) -> None:
    case()


@pytest.mark.parametrize("world", [2, 3])
def test_dist_vae_encoder_has_gradients(world: int) -> None:
    """Its backward of the encoder ended without error and without gradients. An odd height, too."""
    model = tiny_kl(channels=(4, 8), attention=False)
    picture = random_tensor((1, 3, 14, 6))

    def gradients(vae: Any, _: int = 0) -> list[Tensor | None]:
        x = picture.clone().requires_grad_()
        vae.encode(x).latent_dist.mean.square().sum().backward()
        return [x.grad, *(p.grad for p in vae.encoder.parameters())]

    wanted = gradients(copy.deepcopy(model))
    for result in run_ranks(world, on_ranks(model, gradients)):
        for value, right in zip(result, wanted, strict=True):
            assert right is not None and right.abs().max() > 0
            assert_same(value, right, 1e-10, "gradient")


def test_dist_vae_mixes_different_inputs() -> None:  # more: test_failures.py
    def body(vae: Any, rank: int) -> Any:
        with torch.no_grad():
            return vae.decode(random_tensor((1, 4, 6 + rank, 4))).sample

    outcomes = rank_outcomes(2, on_ranks(tiny_kl(channels=(4, 8)), body))
    assert all(isinstance(error, distpatch.RankError) and "(1, 4, 7, 4)" in str(error) for error in outcomes)


def test_dist_vae_loses_channels_last() -> None:
    def body(rank: int) -> bool:
        x = random_tensor((2, 4, 9, 6)).contiguous(memory_format=torch.channels_last)
        w = random_tensor((4, 4, 3, 3)).contiguous(memory_format=torch.channels_last)
        y = F.silu(F.group_norm(F.conv2d(distpatch.shard(x, dist.group.WORLD), w, padding=1), 2))
        return F.interpolate(y, scale_factor=2.0).local.is_contiguous(memory_format=torch.channels_last)

    assert run_ranks(2, body) == [True, True]


DISTRIFUSION = {  # its norms by the mean of squares: test_precision.py, in fp16 at mean 100 as well
    "world sizes that are no power of 2, 12 rows on many ranks": case(
        lambda x, w: F.group_norm(F.conv2d(x, w, padding=1), 2), X, W3, heights=(12, 7), worlds=(3, 5, 8)
    ),
    "full latents after each step": case(
        lambda x, w: F.conv2d(F.conv2d(x, w[:3], padding=1), w, padding=1), X, W3, heights=(7,)
    ),
}


@run_all(DISTRIFUSION)
def test_distrifusion(case: Case) -> None:
    case()


def test_distrifusion_variance_in_half_precision() -> None:
    """fp16 at mean 100: its variance was 0 to 8 where it is 1."""
    x = (random_tensor((1, 4, 64, 64)) + 100).half()

    def body(rank: int) -> Tensor:
        return F.group_norm(distpatch.gather(F.group_norm(distpatch.shard(x, dist.group.WORLD), 2)), 2)

    wanted = F.group_norm(x.double(), 2)
    for result in run_ranks(3, body):
        assert (result.double() - wanted).abs().max() < 2e-2  # the input is rounded to 1/16


def test_distrifusion_keeps_state_between_calls() -> None:
    """Without ``clear()`` it went on with rows of the last picture. Nothing is kept here."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 3, padding=1)).double()
    pictures = [random_tensor((1, 3, rows, 5), seed=rows) for rows in (9, 7, 9)]
    wanted = [model(x).detach() for x in pictures]

    def body(converted: Any, _: int) -> list[Tensor]:
        return [converted(x).detach() for x in pictures]

    for result in run_ranks(2, on_ranks(model, body)):
        for value, right in zip(result, wanted, strict=True):
            assert_same(value, right, 1e-12, "picture")


SGLANG = {
    "heights padded to a multiple of the ranks leak into statistics": case(
        lambda x, w: F.group_norm(F.conv2d(x, w, padding=1), 2).mean((2, 3)), X, W3, heights=(7, 5)
    ),
    "tiles normalised by themselves: colour shifts": case(lambda x: F.group_norm(x, 1) * x.std(), X, heights=(7, 3)),
    "tiles have seams: the receptive field is the picture": case(
        lambda x, w: F.conv2d(F.group_norm(F.conv2d(x, w[:3], padding=1), 1).sigmoid(), w, padding=1), X, W3
    ),
    "causal 3-D convolution with a cache": case(
        lambda x, w: F.conv3d(torch.cat([F.pad(x, (1, 1, 1, 1, 2, 0)), F.pad(x, (1, 1, 1, 1))[:, :, -1:]], 2), w),
        (1, 2, 3, H, 5),
        (3, 2, 3, 3, 3),
    ),
    "parallel encoding changed the conditioning": case(
        lambda x, w: F.conv2d(F.pad(F.conv2d(F.pad(x, (0, 1, 0, 1)), w[:3], stride=2), (0, 1, 0, 1)), w, stride=2), X, W3, heights=(9, 8)
    ),
}  # fmt: skip


@run_all(SGLANG)
def test_sglang_and_tiling(case: Case) -> None:
    case()


def test_vllm_omni_ignored_unsupported_models() -> None:
    """What cannot be done is an error of every rank, not a picture by one of them."""

    class Stores(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.numpy()

    def body(converted: Any, _: int) -> Any:
        return converted(torch.zeros(1, 3, 8, 4))

    outcomes = rank_outcomes(2, on_ranks(Stores(), body))
    assert all(isinstance(error, UnsupportedOpError) and "numpy" in str(error) for error in outcomes)


def test_classes_and_attributes_are_kept() -> None:
    """patch_conv breaks code that reads ``conv.stride``; caches sized by counting ``isinstance`` of convolutions."""
    model = tiny_kl(channels=(4, 8))
    for group, world in ((None, 1), ("world", 2)):

        def body(rank: int) -> None:
            vae = copy.deepcopy(model)
            before = [(name, type(m)) for name, m in vae.named_modules()]
            distpatch.convert_model(vae, None if group is None else dist.group.WORLD, splits=2)
            assert [(name, type(m)) for name, m in vae.named_modules()] == before
            first = vae.decoder.conv_in
            assert (first.stride, first.padding, first.kernel_size) == ((1, 1), (1, 1), (3, 3))

        run_ranks(world, body)


PATCH_CONV: dict[str, dict[str, Any]] = {
    "padding 0": {},
    "padding 'same'": {"padding": "same", "kernel_size": 4},
    "dilation 2: wrong shape": {"padding": 2, "dilation": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "even kernel": {"padding": 1, "kernel_size": 4},
    "stride 2": {"padding": 1, "stride": 2},
    "groups": {"padding": 1, "groups": 2},
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("rows", [16, 13], ids=["rows", "rows that the splits do not divide"])
@pytest.mark.parametrize("how", PATCH_CONV.values(), ids=PATCH_CONV)
def test_patch_conv(how: dict[str, Any], rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, **{"kernel_size": 3, **how}).double()
    x = random_tensor((2, 4, rows, 7))
    wanted = layer(x)
    for sequential in (True, False):
        split = distpatch.convert_model(copy.deepcopy(layer), splits=4, sequential=sequential)
        assert_same(split(x), wanted, 1e-12, "picture")
