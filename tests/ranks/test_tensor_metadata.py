"""What a sharded tensor says of itself without other ranks, and what it refuses or leaves to torch's errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from distpatch import PatchTensor, UnsupportedOpError
from tests.support.oracle import random_tensor
from tests.support.threads import run_ranks


def on_ranks(world: int = 2, shape: tuple[int, ...] = (1, 2, 5, 3)) -> Callable[..., None]:
    """Run a body with a sharded tensor on a few ranks."""

    def run(body: Callable[[PatchTensor], None]) -> None:
        run_ranks(world, lambda rank: body(distpatch.shard(random_tensor(shape), dist.group.WORLD)))

    return run


REFUSED: dict[str, Callable[[PatchTensor], object]] = {
    "numpy": lambda x: x.numpy(),
    "__array__": lambda x: np.asarray(x),
    "__array__ of a list": lambda x: np.array([x]),
    "tolist": lambda x: x.tolist(),
    "__reduce_ex__": lambda x: pickle.dumps(x),
    "torch.save": lambda x: torch.save({"x": x}, io.BytesIO()),
    "data_ptr": lambda x: safetensors.torch.save({"x": x.contiguous()}),
    "__dlpack__": lambda x: np.from_dlpack(x),
    "as_strided": lambda x: x.as_strided((1,), (1,)),
    "share_memory_": lambda x: x.share_memory_(),
    "set_": lambda x: x.set_(torch.zeros(3).double()),
    "apply_": lambda x: x.apply_(lambda v: v),
    "resize_": lambda x: x.resize_(3),
    "detach": lambda x: torch.tensor(x),
    "vmap": lambda x: torch.vmap(lambda t: t * 2)(x),
    "func.grad": lambda x: torch.func.grad(lambda t: t.sum())(x),
    "data": lambda x: setattr(x, "data", torch.zeros(2, 2)),
    "data of another dtype": lambda x: setattr(x, "data", x.float()),
    "batched": lambda x: torch.autograd.grad(x.requires_grad_() * 2, x, torch.ones(2, *x.shape), is_grads_batched=True),
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    """An error that says what to do, and no word to the other ranks."""

    @on_ranks()
    def body(x: PatchTensor) -> None:
        if x.region.comm.rank == 0:
            with pytest.raises(UnsupportedOpError, match=r"distpatch|sharded"):
                REFUSED[name](x)


PLAIN_ERRORS: dict[str, tuple[type[Exception], Callable[[PatchTensor], object]]] = {
    "bool": (RuntimeError, lambda x: bool(x)),
    "item": (RuntimeError, lambda x: x.item()),
    "float": (RuntimeError, lambda x: float(x)),
    "format": (Exception, lambda x: f"{x:.3f}"),
    "hash of address": (AttributeError, lambda x: x.__cuda_array_interface__),
    "backward": (RuntimeError, lambda x: x.requires_grad_().backward()),
    "deepcopy of no leaf": (RuntimeError, lambda x: copy.deepcopy(x.requires_grad_() * 2)),
    "grad of nothing": (RuntimeError, lambda x: torch.autograd.grad(x * 2, x, x)),
    "in place of a leaf": (RuntimeError, lambda x: x.requires_grad_().add_(1)),
    "wrong shape": (RuntimeError, lambda x: x + torch.ones(4)),
    "wrong height": (RuntimeError, lambda x: x * torch.ones(4, 3)),
    "shape": (RuntimeError, lambda x: x.view(7, -1)),
}


@pytest.mark.parametrize("name", PLAIN_ERRORS)
def test_errors_of_torch(name: str) -> None:
    """What one device refuses is refused, and without a collective."""
    error, call = PLAIN_ERRORS[name]

    @on_ranks()
    def body(x: PatchTensor) -> None:
        if x.region.comm.rank == 1:
            with pytest.raises(error) as caught:
                call(x)
            assert not isinstance(caught.value, distpatch.RankError)


def test_printing_needs_no_other_rank() -> None:
    @on_ranks()
    def body(x: PatchTensor) -> None:
        if x.region.comm.rank == 1:
            assert repr(x) == str(x) == f"{x}" == "{}".format(x)  # noqa: UP032
            assert "shape=(1, 2, 5, 3)" in repr(x) and "bounds=(0, 3, 5)" in repr(x)
            assert "blocks=(2,)" in repr(x.flatten(1, 2))
            assert "shape" in dir(x)


def test_the_same_wrapper_comes_back() -> None:
    @on_ranks()
    def body(x: PatchTensor) -> None:
        local = x.local.clone()
        x.local = local
        for same in (
            x.add_(1),
            x.relu_(),
            F.relu(x, inplace=True),
            x.copy_(x),
            x.requires_grad_(False),
            x.contiguous(),
        ):
            assert same is x
        y = x
        y *= 2
        y -= torch.ones(3).double()
        assert y is x and x.local is local
        assert hash(x) == hash(y) and len({x, y}) == 1
        assert x.to(torch.float64) is x and x.cpu() is x
        assert x.data.local.data_ptr() == x.local.data_ptr()
        assert copy.copy(x) is not x and copy.copy(x).local.data_ptr() == x.local.data_ptr()
        deep = copy.deepcopy({"a": x, "b": x})
        assert deep["a"] is deep["b"] and deep["a"].local.data_ptr() != x.local.data_ptr()


def test_metadata_is_global() -> None:
    @on_ranks()
    def body(x: PatchTensor) -> None:
        plain = random_tensor((1, 2, 5, 3))
        assert x.shape == x.size() == plain.shape and x.size(-2) == 5 and len(x) == 1
        assert (x.ndim, x.dim(), x.numel(), x.nelement(), x.nbytes) == (4, 4, 30, 30, 240)
        assert x.stride() == plain.stride() and x.stride(1) == 15
        assert torch.numel(x) == 30 and torch.Size([1, 2, 5, 3]) == x.shape
        assert x.is_leaf and x.grad_fn is None and not x.is_inference() and x._version == 0
        assert (x.requires_grad_() * 2).grad_fn is not None
        assert torch.result_type(x, 1.0) == torch.float64 and not x.is_sparse and x.layout == torch.strided


def test_contiguous_as_on_one_device() -> None:
    for shape in ((2, 2, 5, 3), (5, 3), (1, 4, 5, 2)):
        for change in (
            lambda x: x,
            lambda x: x * 1,
            lambda x: x[..., 1:],
            lambda x: x.transpose(0, 1),
            lambda x: x[..., 1:, :],
        ):
            for kind in (torch.contiguous_format, torch.channels_last)[: len(shape) // 2]:
                wanted = change(random_tensor(shape)).is_contiguous(memory_format=kind)

                @on_ranks(shape=shape)
                def body(x: PatchTensor) -> None:
                    assert change(x).is_contiguous(memory_format=kind) == wanted, (shape, kind)


def test_hooks_where_the_first_argument_is_replicated_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return x * t

    @on_ranks()
    def body(x: PatchTensor) -> None:
        module = Two()
        module.register_full_backward_hook(lambda *_: None)
        with pytest.raises(UnsupportedOpError, match="hooks"):
            module(torch.ones(1, requires_grad=True), x.requires_grad_())
