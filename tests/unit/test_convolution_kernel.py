"""Small pieces are convolved by oneDNN where torch would unfold them; all else is torch's own call."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distpatch.profiling.op_costs import Meter
from distpatch.torch_utils import convolution_kernel
from distpatch.torch_utils.convolution_kernel import convolve
from distpatch.torch_utils.memory_format import memory_format
from tests.support.oracle import random_tensor

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# (sizes, weight): those of one row or of few, which torch unfolds and which are worth it
SMALL = {
    "length": ((1, 128, 128), (64, 128, 3)),
    "rows": ((1, 64, 2, 64), (64, 64, 3, 3)),
    "a row": ((1, 64, 1, 128), (32, 64, 3, 3)),
    "one element": ((1, 128, 8, 128), (128, 128, 1, 1)),
    "volume": ((1, 16, 5, 6, 24), (16, 16, 3, 3, 3)),
    "time": ((1, 64, 5, 8, 24), (64, 64, 3, 1, 1)),
    "voxel": ((1, 96, 4, 4, 64), (96, 96, 1, 1, 1)),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The sizes that oneDNN was called with."""
    sizes: list[torch.Size] = []
    real: Any = convolution_kernel.onednn_convolution

    def counted(x: Tensor, *args: Any) -> Any:
        sizes.append(x.shape)
        return real(x, *args)

    monkeypatch.setattr(convolution_kernel, "onednn_convolution", counted)
    return sizes


@pytest.fixture(autouse=True)
def of_one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(name: str, dtype: torch.dtype = torch.float32, last: bool = False) -> list[Tensor]:
    shape, weight = SMALL[name]
    made = [random_tensor(sizes, seed, dtype=dtype) for seed, sizes in enumerate((shape, weight, weight[:1]))]
    if last and len(shape) in LAST:
        made[0] = made[0].contiguous(memory_format=LAST[len(shape)])
    return made


def call(
    name: str, x: Tensor, w: Tensor, b: Tensor | None = None, s: int = 1, p: int = 1, d: int = 1, kernel: Any = convolve
) -> Tensor:
    spatial = x.ndim - 2
    func, how = CONVOLUTIONS[spatial - 1], [[n] * spatial for n in (s, p, d)]
    result: Tensor = func(x, w, b, *how) if kernel is None else kernel(func, x, w, b, *how, 1)
    return result


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_values_are_torchs(name: str, last: bool, asked: list[torch.Size]) -> None:
    x, w, b = tensors(name, last=last)
    for bias, stride, padding, dilation in product((b, None), (1, 2), (0, 1, 2), (1, 2)):
        try:
            exact = [None if t is None else t.double() for t in (x, w, bias)]
            right = call(name, *exact, stride, padding, dilation, kernel=None)
        except RuntimeError:
            continue  # the kernel is larger than the image
        got = call(name, x, w, bias, stride, padding, dilation)
        assert (got.shape, got.dtype) == (right.shape, torch.float32)
        assert (got - right).abs().max() <= 1e-5 * right.abs().max()
    assert len(asked) >= 2


@pytest.mark.parametrize("name", [name for name in SMALL if name != "length"])
@pytest.mark.parametrize("last", [False, True])
def test_stands_in_memory_as_a_whole_image(name: str, last: bool, asked: list[torch.Size]) -> None:
    x, w, _ = tensors(name, last=last)
    whole = x.repeat(4, *[1] * (x.ndim - 1)).contiguous(memory_format=LAST[x.ndim] if last else torch.contiguous_format)
    with torch.no_grad():
        torch.set_num_threads(2)
        right = memory_format(call(name, whole, w, kernel=None))
        torch.set_num_threads(1)
        assert memory_format(call(name, x, w)) == right == (LAST[x.ndim] if last else torch.contiguous_format)
    assert asked


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_both_orders(name: str, asked: list[torch.Size]) -> None:
    def gradients(kernel: Any) -> list[Tensor]:
        x, w, b = (t.requires_grad_() for t in tensors(name))
        result = call(name, x, w, b, kernel=kernel)
        first = torch.autograd.grad(result.sin().sum(), (x, w, b), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b))]

    for got, right in zip(gradients(convolve), gradients(None), strict=True):
        assert (got - right).abs().max() <= 1e-4 * right.abs().max()
    assert len(asked) == 1


def test_the_smallest_stay_torchs(asked: list[torch.Size]) -> None:
    call("", random_tensor((1, 8, 16, 16), dtype=torch.float32), random_tensor((8, 8, 3, 3), dtype=torch.float32))
    call("", random_tensor((1, 16, 128, 128), dtype=torch.float32), random_tensor((4, 16, 1, 1), dtype=torch.float32))
    assert not asked


def test_what_torch_gives_to_onednn_itself(asked: list[torch.Size]) -> None:
    x, w, _ = tensors("rows")
    call("", torch.cat([x, x]), w)  # a batch
    call("", x.repeat(1, 1, 8, 1), w)
    assert not asked


class Own(Tensor):
    """A class of a user's."""


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "double": Tensor.double,
    "bfloat16": Tensor.bfloat16,
    "meta": lambda t: t.to("meta"),
    "a class of its own": lambda t: t.as_subclass(Own),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_tensors_are_torchs(other: str, asked: list[torch.Size]) -> None:
    assert call("", *map(OTHERS[other], tensors("volume"))).shape == SMALL["volume"][0]
    assert not asked


def test_fake_tensors_are_torchs(asked: list[torch.Size]) -> None:
    with FakeTensorMode():
        assert call("", *(torch.empty(sizes) for sizes in SMALL["volume"])).shape == SMALL["volume"][0]
    assert not asked


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # flags() of torch says so
def test_asks_torchs_switches(asked: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = tensors("volume")
    with torch.backends.mkldnn.flags(enabled=False):
        call("", x, w, b)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        call("", x, w, b)
    assert not asked
    call("", x, w, b)
    assert len(asked) == 1


def test_errors_are_torchs(asked: list[torch.Size]) -> None:
    x, w, b = tensors("volume")
    wrong: list[tuple[Tensor, Tensor, Tensor | None]] = [
        (x[:, :8], w, b),
        (x[:, :, :0], w, b),
        (x, w, b[:3]),
        (x, w, b.double()),
        (x, w.double(), None),
    ]
    for operands in wrong:
        with pytest.raises(RuntimeError) as right:
            call("", *operands, p=0, kernel=None)
        with pytest.raises(RuntimeError) as got:
            call("", *operands, p=0)
        assert str(got.value) == str(right.value)
    for how in ({"s": 0}, {"p": -1}, {"d": 0}):
        with pytest.raises(RuntimeError) as right:
            call("", x, w, b, **how, kernel=None)
        with pytest.raises(RuntimeError) as got:
            call("", x, w, b, **how)
        assert str(got.value) == str(right.value)
    assert not asked


def test_its_work_is_counted(asked: list[torch.Size]) -> None:
    counts = []
    for kernel in (convolve, None):
        with torch.no_grad(), Meter() as meter:
            call("", *tensors("volume"), kernel=kernel)
        counts.append(sum(kernel.flops * times for kernel, times in meter.kernels.items()))
    assert counts[0] == counts[1] > 0
    assert asked
