"""Errors of other systems that shard or tile convolutional models, each as a test that passes here.

Named after the system and the error. Most were silent: a wrong picture, a lost gradient, a wrong shape. Where
more of a case stands elsewhere, a comment says where; the errors of ranks that are missing, late or called
differently are in test_failures.py, groups that are not the world in test_convert.py (``test_groups``).
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import einops
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distpatch
from distpatch import PatchTensor, UnsupportedOpError
from distpatch.profiling.live_memory import LivePeak
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


def controlled(x: Tensor) -> Tensor:
    """Control flow and numbers from values, which on local rows are another rank's business."""
    if x.mean() > 0.01:
        x = x * 2
    return x / float(x.detach().abs().sum()) + x.max().item() - float(x.detach().min())


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


def zeros_of_its_shape(x: Tensor) -> Tensor:
    """A buffer of ``x.shape``: replicated, and as tall as the picture."""
    zeros = x.new_zeros(x.shape)
    zeros[:, :, :1] = 1
    return zeros + x + torch.ones(x.shape, dtype=x.dtype)


TRAPS = {
    "new_zeros of the global shape": case(zeros_of_its_shape, X),
    "plain noise of the global shape": case(lambda x: x + random_tensor(tuple(x.shape), seed=9), X),
    "view by sizes of the shape": case(lambda x: x.view(x.shape[0], -1, x.shape[2] * x.shape[3]), X),
    "einops by sizes of the shape": case(
        lambda x: einops.rearrange(x, "b c (n h) w -> b n (h w c)", n=x.shape[2]), X
    ),
    "interpolate to a size": case(lambda x: F.interpolate(x, size=(11, 7)), X),
    "interpolate to the size of another": case(lambda x, y: y + F.interpolate(x * F.interpolate(y, size=x.shape[-2:]), size=y.shape[-2:]), X, (2, 3, 11, 4)),
    "pad": case(lambda x: F.pad(x, (1, 0, 2, 1)), X),
    "slices of rows": case(lambda x: x[:, :, 1:] - x[:, :, :-1], X, heights=(7, 3)),
    "slices of rows with steps, from behind": case(lambda x: x[:, :, ::2].sum() * x[:, :, -2:], X, heights=(7, 3)),
    "max of everything": case(lambda x: x / x.max(), X),
    "if the mean is positive": case(controlled, X),
    "norm over the flattened tokens": case(
        lambda x: F.group_norm(x.flatten(2), 3).transpose(1, 2).softmax(1), X, heights=(7, 3)
    ),
    "reentrant checkpoint": case(lambda x, w: checkpoint(lambda t: F.conv2d(t, w, padding=1).tanh(), x * 1, use_reentrant=True), X, W3, heights=(7,)),
    "checkpoint": case(lambda x, w: checkpoint(lambda t: F.conv2d(t, w, padding=1).tanh(), x, use_reentrant=False), X, W3),
    "deepcopy": case(lambda x: copy.deepcopy(x.detach()) * x, X),
    "the rank above is also the rank below": case(
        lambda x, w: F.conv2d(F.pad(x, (0, 0, 1, 1), mode="circular"), w[..., :1]), X, W3, worlds=(2,), heights=(7, 2)
    ),
    "no message to send": case(lambda x, w: F.conv2d(x, w[..., :1, :1]), X, W3),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@run_all(TRAPS)
def test_traps_of_a_wrapper(case: Case) -> None:
    case()


WITHOUT_MEMORY: dict[str, Callable[[PatchTensor], object]] = {
    "numpy": lambda x: x.numpy(),
    "data_ptr": lambda x: x.data_ptr(),
    "safetensors": lambda x: safetensors.torch.save({"x": x}),
    "pickle": lambda x: pickle.dumps(x),
    "vmap": lambda x: torch.vmap(lambda t: t * 2)(x),
    "tolist": lambda x: x.tolist(),
}


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_traps_that_are_refused(name: str) -> None:
    def body(rank: int) -> None:
        with pytest.raises(UnsupportedOpError, match=r"distpatch\.gather"):
            WITHOUT_MEMORY[name](distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD))

    run_ranks(2, body)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_sees_all_rows() -> None:
    """A scripted function runs below ``__torch_function__``, where a rank's rows could be taken for the image."""
    scripted, x = torch.jit.script(twice), random_tensor((1, 2, 5, 3))

    def body(rank: int) -> Tensor:
        return distpatch.gather(scripted(distpatch.shard(x, dist.group.WORLD)))

    for found in run_ranks(2, body):
        assert torch.equal(found, twice(x))


def twice(x: Tensor) -> Tensor:
    return x.max() + x * 2


def test_in_place_gives_the_same_wrapper() -> None:  # more: test_tensor_surface.py
    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD)
        local = x.local = x.local.clone()
        assert x.mul_(3) is x and F.relu(x, inplace=True) is x and x.local is local

    run_ranks(2, body)


def test_full_backward_hooks_see_whole_gradients() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1).double()
    x = random_tensor((2, 3, 7, 5))

    def seen(model: nn.Module, _: int = 0) -> list[Tensor]:
        grads: list[Tensor] = []
        model[0].register_full_backward_hook(lambda _, given, made: grads.extend((given[0], made[0])))  # type: ignore[index]
        model(x.clone().requires_grad_()).square().sum().backward()
        return [distpatch.gather(grad) for grad in grads]

    model = nn.Sequential(layer)
    wanted = seen(copy.deepcopy(model))
    for result in run_ranks(2, on_ranks(model, seen)):
        for value, right in zip(result, wanted, strict=True):
            assert_same(value, right, 1e-10, "gradient")


def test_messages_do_not_meet_those_of_the_user() -> None:
    """P2P between collectives on the user's communicator swapped rows; a group [2, 0] has other ranks than the world."""
    x, w = random_tensor((1, 3, 9, 4)), random_tensor((3, 3, 3, 3))

    def body(rank: int) -> None:
        group = dist.new_group([0, 2], use_local_synchronization=True) if rank != 1 else None
        if group is None:
            return
        y = distpatch.shard(x, group)
        for step in range(3):
            number = torch.tensor([float(step)])
            dist.all_reduce(number, group=group)
            y = F.conv2d(y, w, padding=1)
            assert number.item() == 2 * step
        wanted = F.conv2d(F.conv2d(F.conv2d(x, w, padding=1), w, padding=1), w, padding=1)
        assert_same(distpatch.gather(y), wanted, 1e-10, "picture")

    run_ranks(3, body)


def test_the_whole_causal_mask_is_never_made() -> None:
    """A dense mask of Hunyuan's took 49.6 GiB: here a rank makes that of a few of its queries at a time."""
    q = random_tensor((1, 2, 64, 8))

    def body(rank: int) -> int:
        x = distpatch.shard(q, dist.group.WORLD)
        with torch.no_grad(), LivePeak() as live:
            F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return live.peak_bytes

    from distpatch.rules.linalg import attention

    wide, attention.SCORE_BYTES = attention.SCORE_BYTES, 1 << 13
    try:
        assert max(run_ranks(2, body)) < 2 * 64 * 64 * 8  # one head's scores in fp64
    finally:
        attention.SCORE_BYTES = wide
