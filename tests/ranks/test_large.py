"""Tensors of more elements than kernels can index: no call gets one of them, and the result is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distpatch.comm.communicator import ALONE
from distpatch.layout.rows import RowLayout
from distpatch.lazy import patch_plan
from distpatch.rules.core import window_plan
from distpatch.rules.windows import convolution, transposed
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.tensor.region import Region
from distpatch.torch_utils import chunk_sizes
from tests.support.oracle import H, case, random_tensor

LIMIT = 600


@pytest.fixture(autouse=True)
def _limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(patch_plan, "INDEX_LIMIT", LIMIT)
    forget_plans()
    yield
    forget_plans()


def forget_plans() -> None:
    for plan in (convolution._plan, transposed._plan, window_plan.plan_windows, window_plan.plan_rows):
        plan.cache_clear()


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "convolution": lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3, dtype=x.dtype), padding=1),
    "convolution of a few": lambda x: F.conv2d(x[:, :1, ::2], torch.ones(20, 1, 3, 3, dtype=x.dtype), padding=1),
    "transposed": lambda x: F.conv_transpose2d(x, torch.ones(4, 2, 4, 4, dtype=x.dtype), stride=2, padding=1),
    "nearest": lambda x: F.interpolate(x, scale_factor=3.0),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool with indices": lambda x: F.max_pool2d(x, 3, 1, 1, return_indices=True)[0],
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "reflect": lambda x: F.pad(x, (1, 2, 3, 1), mode="reflect"),
    "replicate": lambda x: F.pad(x, (2, 2, 0, 0), mode="replicate"),
}


@pytest.mark.parametrize("name", CALLS)
def test_values(name: str) -> None:
    case(CALLS[name], (1, 4, H, 9), heights=(40, 17), worlds=(1, 2))()


class Largest(TorchDispatchMode):
    """The most elements that a kernel in question was given or has made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(part in str(func) for part in ("conv", "upsample", "pool", "reflection", "replication")):
            for tensor in (args[0], result[0] if isinstance(result, tuple) else result):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("grads", [False, True])
def test_no_call_is_larger(name: str, grads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = PatchTensor(random_tensor((1, 4, 400, 50)), RowLayout(2, (0, 400)), Region(ALONE))
    monkeypatch.setattr(patch_plan, "INDEX_LIMIT", 10 * LIMIT)
    forget_plans()
    chunk_bytes = x.element_size() * 10 * LIMIT  # as far below it as 256 MiB are
    monkeypatch.setitem(chunk_sizes.BY_KIND, "cpu", replace(chunk_sizes.BY_KIND["cpu"], chunk_bytes=chunk_bytes))
    with torch.set_grad_enabled(grads), Largest() as largest:
        CALLS[name](x).local  # type: ignore[attr-defined]  # noqa: B018
    assert 0 < largest.numel < 13 * LIMIT  # what parts overlap by is little of 2**31 elements
