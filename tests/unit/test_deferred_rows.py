"""Deferred rows: what is computed when, what may be overwritten, and that values are those without deferring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from distpatch.comm.communicator import ALONE
from distpatch.errors import DistPatchError
from distpatch.layout.rows import RowLayout
from distpatch.lazy import recipe
from distpatch.profiling.live_memory import LivePeak
from distpatch.rules.elementwise import deferred_pointwise
from distpatch.tensor.options import Options
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.tensor.region import Region
from distpatch.torch_utils import chunk_sizes
from tests.support.oracle import random_tensor

ROWS = 23
SHAPE = (2, 6, ROWS, 5)
KERNEL = random_tensor((6, 6, 3, 3), seed=7) / 6


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recipe, "LEAST_BYTES", 0)
    monkeypatch.setitem(chunk_sizes.BY_KIND, "cpu", replace(chunk_sizes.BY_KIND["cpu"], chunk_bytes=2048))
    with torch.no_grad():
        yield


def sharded(x: Tensor) -> PatchTensor:
    return PatchTensor(x, RowLayout(2, (0, x.shape[2])), Region(ALONE, Options(splits=5, lazy=True)))


def image(seed: int = 0) -> tuple[Tensor, PatchTensor]:
    x = random_tensor(SHAPE, seed)
    return x.clone(), sharded(x)


def conv(x: Tensor) -> Tensor:
    return F.conv2d(x, KERNEL.to(x.dtype), padding=1)


@pytest.mark.parametrize("order", [(0, 3, 1, 2), (0, 1, 3, 2), (0, 2, 3, 1)], ids=["channels", "columns", "rows"])
def test_the_order_of_a_view_is_kept(order: tuple[int, ...]) -> None:
    """Element-wise results have their dims in memory as on one device, whatever the stride of a batch of one."""
    tokens = random_tensor((1, 8, 16, 6))  # in memory with one dim moved to the end
    x = tokens.permute(order)
    right = x + x
    y = sharded(x) + 1.0
    assert y.stride() == right.stride() and y.local.stride() == right.stride()
    odd = tokens.as_strided((1, 16, 8, 6), (7, 1, 96, 16))  # as reshapes leave it: channels-last, but for the batch
    y, right = sharded(odd) + 1.0, odd + 1.0
    assert y.stride()[1:] == y.local.stride()[1:] == right.stride()[1:]


def norm(x: Tensor) -> Tensor:
    return F.group_norm(x, 3)


def equal(lazily: Tensor, right: Tensor) -> None:
    assert isinstance(lazily, PatchTensor)
    torch.testing.assert_close(lazily.local, right, rtol=1e-12, atol=1e-12)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def around(x: Tensor) -> Tensor:
    return conv(F.silu(x)) + x


def two_windows(x: Tensor) -> Tensor:
    """The second convolution has the rows computed; the first still waits for them."""
    return conv(x) + 0.5 * F.conv2d(F.conv2d(x, KERNEL[:2], padding=1), KERNEL[:, :2], padding=1)


CHAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm, activation": lambda x: F.silu(norm(x)),
    "convolution": conv,
    "norm, activation, convolution": lambda x: conv(F.silu(norm(x))),
    "chain of convolutions": lambda x: conv(F.relu(conv(F.gelu(conv(x))))),
    "residual block": lambda x: x + conv(F.silu(norm(conv(F.silu(norm(x)))))),
    "shared": lambda x: swish(conv(x)),
    "shared by window and sum": lambda x: around(norm(x) * 2),
    "enlarged": lambda x: conv(F.interpolate(F.silu(conv(x)), scale_factor=3.0)),
    "enlarged last": lambda x: F.interpolate(conv(x), scale_factor=(2.0, 1.0)),
    "padded": lambda x: F.conv2d(F.pad(F.silu(x), (1, 1, 1, 1)), KERNEL),
    "padded by edges": lambda x: F.conv2d(F.pad(norm(x), (1, 1, 4, 2), mode="replicate"), KERNEL, stride=2),
    "padded alone": lambda x: F.pad(F.silu(x), (0, 2, 9, 7)),
    "concatenated": lambda x: norm(torch.cat([F.silu(x), conv(x), x], 1)),
    "stride": lambda x: F.conv2d(F.silu(x), KERNEL, stride=2, padding=1),
    "dilation": lambda x: F.conv2d(F.silu(x), KERNEL, padding=2, dilation=2),
    "even kernel": lambda x: F.conv2d(F.silu(x), KERNEL[:, :, :2, :2], padding=1),
    "all windows above": lambda x: F.conv2d(F.pad(F.silu(x), (1, 1, 2, 0)), KERNEL),
    "broadcast": lambda x: x.mean((2, 3), keepdim=True) * F.silu(x) - torch.arange(6.0).view(6, 1, 1),
    "in place": lambda x: F.relu(conv(x), inplace=True).add_(1).mul_(x),
    "half": lambda x: conv(x.float()).double(),
    "maximum": lambda x: torch.maximum(norm(x), x).clamp(-1, 1),
    "reflected scalars": lambda x: 2 / (1 + (1 - F.silu(x)).square()),
    "two windows": lambda x: two_windows(F.silu(norm(x))),
    "instance norm": lambda x: conv(F.instance_norm(x)),
    "channels": lambda x: F.conv2d(norm(x), KERNEL[:, :, :1, :1]) + F.conv2d(x, KERNEL[:, :, :1, :1]),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("held", [False, True])
def test_values(name: str, held: bool) -> None:
    """Whether or not somebody holds what the result may be written over."""
    plain, x = image()
    copies = plain.clone()
    kept = [x] if held else []
    right = CHAINS[name](plain)
    y = CHAINS[name](x)
    assert isinstance(y, PatchTensor)
    assert y.is_deferred
    del x
    tolerance = 1e-5 if name == "half" else 1e-12
    torch.testing.assert_close(y.local, right, rtol=tolerance, atol=tolerance)
    for x in kept:
        torch.testing.assert_close(x.local, copies, rtol=0, atol=0)


CHANNEL = KERNEL[:, :1, :1, 0]
OPERANDS: dict[str, tuple[object, ...]] = {  # beside the first; functions that are not here have that alone
    **dict.fromkeys("add sub subtract mul multiply div divide true_divide maximum minimum rsub".split(), (CHANNEL,)),
    **dict.fromkeys("radd rmul truediv rdiv rtruediv pow clamp_max clamp_min".split(), (0.5,)),
    **dict.fromkeys(("clamp", "clip"), (0.1, 0.5)),
    **dict.fromkeys(("addcdiv", "addcmul"), (CHANNEL, CHANNEL)),
    "lerp": (CHANNEL, 0.3),
}


@pytest.mark.parametrize("name", sorted(deferred_pointwise.NAMES))
def test_every_function_of_the_list_is_deferred(name: str) -> None:
    places = [(F, name), (Tensor, name), (torch, name), (Tensor, f"__{name}__")]
    function = next(getattr(place, known) for place, known in places if hasattr(place, known))
    plain, operands = image()[0].abs(), OPERANDS.get(name, ())
    plain = plain.float() if name in {"half", "bfloat16", "double"} else plain
    for format in (torch.contiguous_format, torch.channels_last):
        plain = plain.contiguous(memory_format=format)
        y, right = function(sharded(plain.clone()), *operands), function(plain, *operands)
        assert y.is_deferred
        assert y.stride() == y.local.stride() == right.stride()
        equal(y, right)


def test_a_function_of_somebodys_own_with_the_name_of_a_deferred_one() -> None:
    """torch's is not called in its place, over rows that nobody holds."""

    @distpatch.register_pointwise
    def sigmoid(x: Tensor) -> Tensor:
        return (x + 3).clamp(0, 6) / 6

    plain, x = image()
    equal(sigmoid(x * 2), sigmoid(plain * 2))


def test_no_step_exists_as_a_whole() -> None:
    """Between a tensor and its convolution there are patches alone; a result takes the place of what nobody holds."""
    x = sharded(random_tensor((1, 6, 400, 50)))
    size = x.local.nbytes
    with LivePeak() as live:
        y = conv(F.silu(x * 2))
        del x
        y.local  # noqa: B018
    assert live.peak_bytes < size
    z = sharded(random_tensor((1, 6, 400, 50)))
    with LivePeak() as live:
        y = conv(F.silu(z * 2))
        y.local  # noqa: B018
    assert size < live.peak_bytes < 2 * size  # z is held


def test_what_others_hold_is_not_overwritten() -> None:
    plain, x = image()
    view = x.local[:, :, 1:]  # of the same memory
    y = conv(x)
    del x
    equal(y, conv(plain))
    torch.testing.assert_close(view, plain[:, :, 1:], rtol=0, atol=0)
    part = random_tensor((2, 6, 2 * ROWS, 5))[:, :, ::2]  # not all of its memory
    y = conv(sharded(part))
    before = part.clone()
    del part
    equal(y, conv(before))


def test_two_that_wait_for_the_same() -> None:
    plain, x = image()
    one, other = F.silu(x), conv(x)
    del x
    equal(one, F.silu(plain))
    equal(other, conv(plain))
    plain, x = image()
    first = norm(x)
    second = F.silu(first)
    del x
    equal(second, F.silu(norm(plain)))
    equal(first, norm(plain))


def test_written_to_before_it_was_read() -> None:
    """What is made of a tensor is what it was."""
    plain, x = image()
    y, z = F.silu(x), conv(x)
    x.mul_(3)
    equal(y, F.silu(plain))
    equal(z, conv(plain))
    equal(x, plain * 3)
    plain, x = image()
    y = F.silu(x)
    x[:, 1:3] = 7.0  # a view, inside
    equal(y, F.silu(plain))
    a = norm(x)
    b = F.silu(a)
    a.add_(1)  # waits itself
    right = norm(x.local)
    equal(b, F.silu(right))
    equal(a, right + 1)
    out = x.clone()
    c = conv(out)
    right = conv(out.local)
    torch.add(x, 1, out=out)
    equal(c, right)


def test_operand_written_to_before_it_was_read() -> None:
    plain, x = image()
    scale = torch.ones(6, 1, 1, dtype=torch.float64)
    y = x * scale
    scale.zero_()
    equal(y, plain)


def test_a_weight_written_to_is_refused() -> None:
    _, x = image()
    layer = nn.Conv2d(6, 6, 3, padding=1).double()
    y = layer(x)
    layer.weight.mul_(2)
    with pytest.raises(DistPatchError, match=r"conv2d: a weight was written to.*lazy=False"):
        y.local  # noqa: B018


def test_weights_that_are_moved_stay() -> None:
    """As hooks that keep weights elsewhere between calls do."""
    plain, x = image()
    layer = nn.Conv2d(6, 6, 3, padding=1).double()
    right = layer(plain)
    y = layer(x)
    layer.weight.data = torch.zeros(1, dtype=torch.float64)
    equal(y, right)


def test_computed_once() -> None:
    """A convolution whose result is read twice, and rows that two convolutions read."""
    calls = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = conv(x)
            return F.silu(y) + F.gelu(y)

    plain, x = image()
    right = Counting()(plain)
    original = recipe.Walk.window

    def counted(self: recipe.Walk, *args: object) -> Tensor:
        calls.append(args[1])
        return original(self, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.Walk, "window", counted)
        y = Counting()(x)
        del x
        equal(y, right)
    assert len(calls) == len(set(calls))


def test_residuals_do_not_pile_up() -> None:
    """A chain of sums keeps no more than a few tensors alive."""
    plain, x = image()
    for seed in range(1, 9):
        other = random_tensor(SHAPE, seed)
        plain = plain + other
        x = x + sharded(other.clone())
        assert x.local_or_recipe is x.local or x.as_recipe.held_bytes <= recipe.MOST_HELD * plain.nbytes
    equal(x, plain)
    for _ in range(3 * recipe.MOST_STEPS):
        plain, x = plain * 0.9, x * 0.9
        assert x.as_recipe.steps <= recipe.MOST_STEPS + 1
    equal(x, plain)


def test_gradients_and_autocast_do_not_wait() -> None:
    _, x = image()
    with torch.enable_grad():
        assert not F.silu(x).is_deferred
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not conv(x).is_deferred
    waiting = F.silu(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(waiting).dtype == torch.bfloat16
    with torch.enable_grad():
        weight = KERNEL.clone().requires_grad_()
        F.conv2d(F.silu(waiting).double(), weight).local.sum().backward()
    assert weight.grad is not None


def test_what_is_known_of_it_is_known_at_once() -> None:
    _, x = image()
    y = F.interpolate(conv(x.float()), scale_factor=2.0)
    assert (y.shape, y.dtype, y.device.type, y.ndim) == ((2, 6, 2 * ROWS, 10), torch.float32, "cpu", 4)
    assert y.contiguous() is y
    assert y.to(torch.float32) is y
    assert F.dropout(y, 0.5, False) is y
    assert y.is_deferred
    assert repr(y)
    assert y.is_deferred


def test_inference_mode() -> None:
    """Rows made in inference mode are not written over outside of it."""
    plain, x = image()
    with torch.inference_mode():
        y = F.silu(x.clone())
    equal(y, F.silu(plain))
    with torch.inference_mode():
        y = conv(F.silu(x.clone()))
    z = y + 1
    del y
    equal(z, conv(F.silu(plain)) + 1)


def test_memory_formats() -> None:
    plain, _ = image()
    plain = plain.contiguous(memory_format=torch.channels_last)
    for name, chain in CHAINS.items():
        if name == "instance norm":  # torch's own leaves the format
            continue
        y = chain(sharded(plain.clone(memory_format=torch.preserve_format)))
        right = chain(plain)
        torch.testing.assert_close(y.local, right, rtol=1e-5, atol=1e-5)
        assert y.local.stride() == right.stride()


def test_switched_off() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.SiLU()).double()
    plain = random_tensor(SHAPE)
    right = model(plain)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.is_deferred))
    for on in (True, False):
        distpatch.convert_model(model, splits=3, lazy=on)
        torch.testing.assert_close(model(plain), right, rtol=1e-12, atol=1e-12)
        distpatch.restore_model(model)
    assert seen == [True, False]


def test_the_trace_shows_what_was_fused() -> None:
    _, x = image()
    with distpatch.trace() as t:
        y = conv(F.silu(norm(x)))
        y.local  # noqa: B018
    (fused,) = t.fused.values()
    assert (fused.steps, fused.count, fused.spared_bytes) == ("group_norm > silu > conv2d", 1, 2 * y.local.nbytes)
    assert "group_norm > silu > conv2d (1 times" in t.table()


def test_failed_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been overwritten in part is not taken for what it was."""
    _, x = image()
    y = conv(x)
    del x
    calls = []

    def fail_later(*args: object) -> Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return original(*args)  # type: ignore[arg-type]

    original = recipe.Walk.window
    monkeypatch.setattr(recipe.Walk, "window", fail_later)
    with pytest.raises(MemoryError):
        y.local  # noqa: B018
    with pytest.raises(DistPatchError, match="failed halfway"):
        y.local  # noqa: B018


def test_measured_where_it_was_asked_for() -> None:
    """The kernels of a convolution are the convolution's, whoever reads its result."""
    _, x = image()
    with distpatch.trace(measure=True) as t:
        norm(conv(F.silu(x))).local  # type: ignore[attr-defined]  # noqa: B018
    ops = t.ops()
    assert ops["conv2d"].flops > 0 == ops["group_norm"].flops == ops["silu"].flops
    assert min(ops[op].calls for op in ("conv2d", "group_norm", "silu")) == 1
    assert ops["silu"].moved_bytes > 0


def test_written_to_in_place_it_stays_what_it_is() -> None:
    """Of its dtype; and a shape that does not fit is refused, as on one device."""
    plain, x = image()
    y = F.silu(x.float())
    y.mul_(torch.full((6, 1, 1), 1 / 3, dtype=torch.float64))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.local, F.silu(plain.float()) / 3)
    one = F.silu(sharded(plain[:1].clone()))
    with pytest.raises(RuntimeError):
        one.mul_(torch.ones(2, 1, 1, 1, dtype=torch.float64))
    equal(one, F.silu(plain[:1]))
