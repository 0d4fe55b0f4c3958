"""Patch Conv of one layer, by function, by module and in a converted model, against the plain layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import distpatch
from distpatch import LayoutError, PatchConv2d
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import run_ranks

SPLITS = (4, 3, 100)  # 100: more than there are rows
X1, X2, X3 = (2, 4, 13), (2, 4, 13, 6), (1, 4, 3, 11, 4)  # heights that none of the splits divides
Case = tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]


def conv(kind: type[nn.Module], shape: tuple[int, ...], kernel: Any, **options: Any) -> Case:
    return kind, shape, {"kernel_size": kernel, **options}


CASES = {
    "3x3": conv(nn.Conv2d, X2, 3, padding=1),
    "no bias": conv(nn.Conv2d, X2, 3, padding=1, bias=False),
    "padding 0": conv(nn.Conv2d, X2, 3),
    "padding wider than the kernel": conv(nn.Conv2d, X2, 3, padding=4),
    "1x1": conv(nn.Conv2d, X2, 1),
    "1x3": conv(nn.Conv2d, X2, (1, 3), padding=(0, 1)),
    "stride 2": conv(nn.Conv2d, X2, 3, stride=2, padding=1),
    "stride 3, padding 0": conv(nn.Conv2d, X2, 3, stride=3),
    "stride wider than the kernel": conv(nn.Conv2d, X2, 2, stride=3),
    "dilation 2": conv(nn.Conv2d, X2, 3, padding=2, dilation=2),
    "dilation and stride": conv(nn.Conv2d, X2, 3, padding=3, dilation=3, stride=2),
    "2x2": conv(nn.Conv2d, X2, 2),
    "4x4 padding 1": conv(nn.Conv2d, X2, 4, padding=1),
    "4x4 padding 2": conv(nn.Conv2d, X2, 4, padding=2),
    "4x4 stride 2": conv(nn.Conv2d, X2, 4, stride=2, padding=1),
    "halo wider than a patch": conv(nn.Conv2d, X2, (11, 3), padding=(5, 1)),
    "as tall as the image": conv(nn.Conv2d, X2, (13, 3)),
    "divisible height": conv(nn.Conv2d, (2, 4, 12, 6), 3, padding=1),
    "one row": conv(nn.Conv2d, (2, 4, 1, 6), 3, padding=1),
    "groups": conv(nn.Conv2d, X2, 3, padding=1, groups=2),
    "depthwise": conv(nn.Conv2d, X2, 5, padding=2, groups=4),
    "same": conv(nn.Conv2d, X2, 3, padding="same"),
    "same, even kernel, dilation": conv(nn.Conv2d, X2, (4, 2), padding="same", dilation=(2, 1)),
    "valid": conv(nn.Conv2d, X2, 3, padding="valid"),
    "reflect": conv(nn.Conv2d, X2, 5, padding=2, padding_mode="reflect"),
    "replicate": conv(nn.Conv2d, X2, 3, padding=(2, 1), padding_mode="replicate", stride=2),
    "circular": conv(nn.Conv2d, X2, 3, padding=1, padding_mode="circular"),
    "circular, same, even kernel": conv(nn.Conv2d, X2, (4, 3), padding="same", padding_mode="circular"),
    "unbatched": conv(nn.Conv2d, X2[1:], 3, padding=1),
    "unbatched, reflect": conv(nn.Conv2d, X2[1:], 3, padding=1, padding_mode="reflect"),
    "1-D": conv(nn.Conv1d, X1, 4, padding=1),
    "1-D stride, replicate": conv(nn.Conv1d, X1, 3, padding=1, stride=2, padding_mode="replicate"),
    "1-D unbatched": conv(nn.Conv1d, X1[1:], 3, padding=1, dilation=2),
    "3-D": conv(nn.Conv3d, X3, 3, padding=1),
    "3-D stride, even kernel": conv(nn.Conv3d, X3, (1, 4, 4), padding=(0, 1, 1), stride=(1, 2, 2)),
    "3-D circular": conv(nn.Conv3d, X3, 3, padding=1, padding_mode="circular"),
    "3-D unbatched": conv(nn.Conv3d, X3[1:], (2, 3, 3), padding="same"),
    "transposed": conv(nn.ConvTranspose2d, X2, 3, padding=1),
    "transposed, stride 2": conv(nn.ConvTranspose2d, X2, 4, stride=2, padding=1),
    "transposed, all": conv(nn.ConvTranspose2d, X2, 3, stride=3, padding=2, output_padding=2, dilation=2, groups=2),
    "transposed, unbatched": conv(nn.ConvTranspose2d, X2[1:], 3, stride=2, bias=False),
    "1-D transposed": conv(nn.ConvTranspose1d, X1, 4, stride=2, padding=1),
    "3-D transposed": conv(nn.ConvTranspose3d, X3, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1)),
}
FUNCTIONS = {
    nn.Conv1d: distpatch.patch_conv1d,
    nn.Conv2d: distpatch.patch_conv2d,
    nn.Conv3d: distpatch.patch_conv3d,
    nn.ConvTranspose1d: distpatch.patch_conv_transpose1d,
    nn.ConvTranspose2d: distpatch.patch_conv_transpose2d,
    nn.ConvTranspose3d: distpatch.patch_conv_transpose3d,
}


class Within(nn.Module):
    """A layer in a model that takes at least four dims, as images have, whatever the layer takes."""

    def __init__(self, layer: nn.Module, more: int) -> None:
        super().__init__()
        self.layer, self.more = layer, more

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.more):
            x = x.squeeze(0)
        return self.layer(x)


def results(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Values with and without autograd; gradients of the input and of the parameters, for a random cotangent."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.no_grad():
        values = call(x)
    out = call(x)
    out.backward(random_tensor(tuple(out.shape), seed=1))
    return [values, out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def ways(layer: Any, x: Tensor, splits: int, sequential: bool) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Every public way to convolve as this layer does, in patches."""
    options = {"splits": splits, "sequential": sequential}
    how = {"padding": layer.padding, "groups": layer.groups, "stride": layer.stride, "dilation": layer.dilation}
    if layer.transposed:
        how["output_padding"] = layer.output_padding
        how["splits"] = splits
    else:
        how |= {"padding_mode": layer.padding_mode, **options}
    function = FUNCTIONS[type(layer)]
    yield function.__name__, lambda t: function(t, layer.weight, layer.bias, **how)
    if type(layer) is nn.Conv2d:
        yield "PatchConv2d", PatchConv2d(splits, sequential, layer)
    more = max(4 - x.ndim, 1)
    model = distpatch.convert_model(Within(layer, more), dim=-1 if len(layer.kernel_size) == 1 else -2, **options)
    yield "convert_model", lambda t: model(t[(None,) * more])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_patches(case: Case) -> None:
    kind, shape, options = case
    x = random_tensor(shape)
    torch.manual_seed(0)
    layer = kind(4, 6, **options).double() if "groups" not in options else kind(4, 4, **options).double()
    right = results(layer, layer, x)
    for splits in SPLITS:
        for sequential in (True, False):
            for name, call in ways(layer, x, splits, sequential):
                found = results(call, layer, x)
                assert len(found) == len(right)
                for index, (value, wanted) in enumerate(zip(found, right, strict=True)):
                    assert_same(value, wanted, 1e-10, f"{name}, {splits} splits, sequential={sequential}: [{index}]")


class Convolutions(TorchDispatchMode):
    """The shapes of the images that torch is given to convolve."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sequential", [True, False])
def test_one_patch_at_a_time_or_all_in_the_batch(sequential: bool) -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    for name, call in ways(layer, torch.zeros(2, 4, 13, 6), 4, sequential):
        with torch.no_grad(), Convolutions() as seen:
            call(torch.zeros(2, 4, 13, 6))
        expected = [(2, 4, 6, 6)] * 3 + [(2, 4, 3, 6)] if sequential else [(8, 4, 6, 6)]
        assert seen.shapes == expected, name
        whole = [PatchConv2d(1, sequential, layer), PatchConv2d("auto", sequential, layer)]
        for module in whole:
            with torch.no_grad(), Convolutions() as seen:
                module(torch.zeros(2, 4, 13, 6))
            assert seen.shapes == [(2, 4, 13, 6)]


def test_the_module_is_the_layer_it_was_made_of() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, stride=2, padding_mode="circular").eval().requires_grad_(False)
    called = []
    layer.register_forward_hook(lambda *_: called.append(1))
    patches = PatchConv2d(splits=4, conv2d=layer)
    assert isinstance(patches, nn.Conv2d) and patches.weight is layer.weight and not patches.training
    assert (patches.stride, patches.padding, patches.kernel_size) == ((2, 2), (1, 1), (3, 3))
    assert list(patches.state_dict()) == list(layer.state_dict()) == ["weight", "bias"]
    assert repr(patches) == repr(layer).replace("Conv2d", "PatchConv2d")[:-1] + ", splits=4, sequential=True)"
    patches(torch.zeros(1, 4, 8, 8))
    assert called
    patches.weight = nn.Parameter(torch.zeros(6, 4, 3, 3))
    assert layer.weight is not patches.weight
    other = PatchConv2d(3, False, None, 4, 6, 3, bias=False)
    assert (other.splits, other.sequential, other.bias, other.kernel_size) == (3, False, None, (3, 3))
    again = PatchConv2d(splits=5, conv2d=copy.deepcopy(other))
    assert (other.splits, again.splits) == (3, 5)
    assert_same(again(torch.ones(1, 4, 8, 8)), again._conv_forward(torch.ones(1, 4, 8, 8), again.weight, None), 0, "")


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 5}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
@pytest.mark.parametrize("sequential", [True, False])
def test_memory_format_is_kept(options: dict[str, Any], sequential: bool) -> None:
    """Also by patches that reach beyond the image, or lie there."""
    layer = nn.Conv2d(4, 6, 3, **options)
    for batch in (1, 2):
        x = torch.randn(batch, 4, 13, 6).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert PatchConv2d(6, sequential, layer)(x).is_contiguous(memory_format=torch.channels_last)


def test_in_a_converted_model_each_rank_cuts_its_own_rows() -> None:
    layers = (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 4, stride=2, padding=1, padding_mode="reflect"))
    plain = nn.Sequential(*layers).double()
    patches = nn.Sequential(*(PatchConv2d(2, False, layer) for layer in layers))
    x = random_tensor((2, 4, 13, 6))
    right = plain(x)

    def body(rank: int) -> Tensor:
        model = distpatch.convert_model(copy.deepcopy(patches), dist.group.WORLD)
        return model(x)

    for value in run_ranks(3, body):
        assert_same(value, right, 1e-12, "on ranks")


def test_compiled() -> None:
    """One graph, alone and in a converted model."""
    layer = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    x = random_tensor((1, 4, 13, 6), dtype=torch.float32)
    for model in (PatchConv2d(3, True, layer), distpatch.convert_model(nn.Sequential(PatchConv2d(3, True, layer)))):
        with torch.no_grad():
            value = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert_same(value, layer(x), 1e-6, type(model).__name__)


def refusals() -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    x, w, layer = torch.zeros(2, 4, 5, 6), torch.zeros(6, 4, 3, 3), nn.Conv2d(4, 6, 3)

    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return input

    return {
        "splits": (lambda: distpatch.patch_conv2d(x, w, splits=0), ValueError, "splits is a number"),
        "module's splits": (lambda: PatchConv2d("many", True, layer), ValueError, "splits is a number"),
        "mode": (lambda: distpatch.patch_conv2d(x, w, splits=2, padding_mode="mirror"), ValueError, "'mirror'"),
        "dims": (lambda: distpatch.patch_conv2d(x[0, 0], w, splits=2), LayoutError, r"shape \(5, 6\)"),
        "too small": (lambda: distpatch.patch_conv2d(x[:, :, :2], w, splits=2), LayoutError, "smaller than the kernel"),
        "two layers": (lambda: PatchConv2d(4, True, layer, 4, 6, 3), TypeError, "not both"),
        "another layer": (lambda: PatchConv2d(conv2d=nn.Linear(2, 2)), TypeError, "got Linear"),
        "own forward": (lambda: PatchConv2d(conv2d=Own(4, 6, 3)), TypeError, "Own has a forward of its own"),
        "weight norm": (lambda: PatchConv2d(conv2d=weight_norm(layer)), TypeError, "is computed"),
    }


@pytest.mark.parametrize("name", refusals())
def test_refusals(name: str) -> None:
    call, error, words = refusals()[name]
    with pytest.raises(error, match=words):
        call()
