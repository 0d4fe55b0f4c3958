"""A user's own classes of tensor, and the kinds of tensor that are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import distpatch
from distpatch import LayoutError, PatchTensor
from distpatch.torch_utils.tree import tensors_in
from tests.support.calls import SHAPE, Net, ranked
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import run_ranks


# A user's own classes of tensor.
class Marked(Tensor):
    """As torch makes one: the class stays, attributes do not."""


class Scaled(Tensor):
    """Its results have its attribute."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        scale = next((t.scale for t in tensors_in((args, kwargs)) if hasattr(t, "scale")), None)
        if isinstance(result, cls) and scale is not None:
            result.scale = scale
        return result


class Plain(Tensor):
    """Results are plain, as those of torchvision's tv_tensors are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(Tensor) if isinstance(result, Tensor) else result


def scaled(x: Tensor) -> Tensor:
    result = x.as_subclass(Scaled)
    result.scale = 3.0
    return result


def meta(x: Tensor) -> Tensor:
    return MetaTensor(x, affine=2 * torch.eye(4), meta={"name": "scan", "list": [1]})


CLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "without an own function": lambda x: x.as_subclass(Marked),
    "with attributes": scaled,
    "plain results": lambda x: x.as_subclass(Plain),
    "MetaTensor": meta,
    "parameter": nn.Parameter,
    "buffer": nn.Buffer,
}


def facts(tensor: Tensor) -> Any:
    described = {name: value for name, value in vars(tensor).items() if not isinstance(value, Tensor)}
    described.pop("_meta", None)
    info = getattr(tensor, "meta", {}) if isinstance(tensor, MetaTensor) else {}
    return type(tensor).__name__, described, {key: str(value) for key, value in info.items()}


class Small(nn.Module):
    """With rows that are deferred where they are large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 3, 1, 1))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, label: Any = None) -> Any:
        y = self.body(F.interpolate(x, scale_factor=2.0) + 1)
        return {"image": y, "mean": y.mean((2, 3)), "label": label, "scale": self.scale, "same": F.silu(x)}


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [7, 301])
def test_a_users_own_class_of_tensor(make: Any, grad: bool, rows: int) -> None:
    """Type and attributes of results are those of one device, below and above what is deferred, on any number of ranks."""
    model = Small()
    columns = 5 if rows < 10 else 301
    x, label = random_tensor((1, 2, rows, columns), dtype=torch.float32), torch.ones(3)

    def run(net: Any, rank: int = 0) -> Any:
        given = make(x.clone())
        if grad and given.is_leaf:
            given.requires_grad_()
        with torch.set_grad_enabled(grad):
            result = net(given, label)
            if grad:
                result["image"].square().sum().backward()
        assert result["label"] is label and result["scale"] is net.scale
        return result, given.grad

    right, right_grad = run(model)
    model.zero_grad()
    assert type(right["image"]) is type(make(x)) or right["image"].__class__ is Tensor
    runs = [(world, {"output": "gather"}) for world in (1, 2, 3)] + [(2, {"output": "shard"}), (2, {"output": "rank0"})]
    runs += [(2, {"lazy": False, "splits": 3})]
    for world, options in runs:
        if grad and options.get("output") in {"shard", "rank0"}:
            continue

        def body(rank: int, options: Any = options) -> Any:
            net = distpatch.convert_model(copy.deepcopy(model), dist.group.WORLD, fallback="error", **options)
            result, gradient = run(net)
            return distpatch.gather(result), gradient

        for rank, (result, gradient) in enumerate(run_ranks(world, body, keep=True)):
            if options.get("output") == "rank0" and rank > 0:
                assert result["image"] is None
                continue
            for key, wanted in right.items():
                assert facts(result[key]) == facts(wanted), key
                assert_same(result[key].as_subclass(Tensor), wanted.as_subclass(Tensor), 1e-4, key)
            assert_same(gradient, right_grad, 1e-3, "gradient")


@pytest.mark.parametrize(
    "make",
    [CLASSES["with attributes"], CLASSES["MetaTensor"], nn.Parameter],
    ids=["with attributes", "MetaTensor", "parameter"],
)
@pytest.mark.parametrize("columns", [5, 40000])
def test_own_classes_outside_a_model(make: Any, columns: int) -> None:
    """Sharded, adopted, gathered, and through one layer in patches."""
    x = make(random_tensor((1, 2, 7, columns), dtype=torch.float32))
    weight = random_tensor((2, 2, 3, 3), dtype=torch.float32)
    right = F.conv2d(x, weight, padding=1)
    alone = distpatch.patch_conv2d(x, weight, padding=1, splits=3)
    layer = distpatch.PatchConv2d(3, True, None, 2, 2, 3, padding=1)
    assert facts(alone) == facts(right) == facts(layer(x))

    def body(rank: int) -> None:
        for rows in (distpatch.shard(x, dist.group.WORLD), adopted(x, rank)):
            assert type(rows) is PatchTensor and type(rows.local) in {Tensor, nn.Parameter}
            with torch.no_grad():
                result = distpatch.gather({"y": F.conv2d(F.relu(rows), weight, padding=1), "plus": rows + x})
            assert facts(result["y"]) == facts(right)
            assert facts(result["plus"]) == facts(x + x)

    run_ranks(2, body, keep=True)


def adopted(x: Tensor, rank: int) -> PatchTensor:
    local = (x[:, :, :4], x[:, :, 4:])[rank]
    return PatchTensor.from_local(local, dist.group.WORLD)


# What is refused, and what the error says to do.
class Wrapped(Tensor):
    @staticmethod
    def __new__(cls, x: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.empty(SHAPE)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "uint8": (lambda: torch.zeros(SHAPE, dtype=torch.uint8), r"torch.uint8.*x\.float\(\) / 255"),
    "integers": (lambda: torch.zeros(SHAPE, dtype=torch.long), r"torch.int64.*x\.float\(\)"),
    "bool": (lambda: torch.zeros(SHAPE, dtype=torch.bool), r"torch.bool.*x\.float\(\)"),
    "complex": (lambda: torch.zeros(SHAPE, dtype=torch.complex64), r"x\.real, x\.imag"),
    "no batch": (lambda: torch.zeros(SHAPE[1:]), r"\(3, 7, 5\).*x\.unsqueeze\(0\).*\[0\]"),
    "no batch, uint8": (lambda: torch.zeros(SHAPE[1:], dtype=torch.uint8), r"\(x\.float\(\) / 255\)\.unsqueeze\(0\)"),
    "no channels": (lambda: torch.zeros(7, 5), r"x\[None, None\]"),
    "list of sizes": (lambda: [torch.zeros(3, 7, 5), torch.zeros(3, 8, 5)], r"for each as x\.unsqueeze\(0\)"),
    "numpy": (lambda: np.zeros(SHAPE, dtype="float32"), r"torch\.from_numpy\(x\)"),
    "numpy in a dict": (lambda: {"image": np.zeros(SHAPE)}, r"torch\.from_numpy\(x\)"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.zeros(SHAPE), 1.0, 0, torch.quint8), r"x\.dequantize\(\)"),
    "sparse": (lambda: torch.zeros(SHAPE).to_sparse(), r"sparse_coo.*x\.to_dense\(\)"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(3, 7, 5), torch.zeros(3, 6, 5)]), r"x\.unbind\(\)"),
    "a class with its own dispatch": (lambda: Wrapped(torch.zeros(SHAPE)), r"is a Wrapped.*a plain tensor"),
    "fake": (fake, r"FakeTensor has no values.*distpatch\.plan"),
}


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refusals_say_the_way_out(make: Any, text: str) -> None:
    def body(net: Any, rank: int) -> None:
        with pytest.raises(LayoutError, match=text):
            net(make())

    ranked(Net(lambda net, y: y), body, 2)
