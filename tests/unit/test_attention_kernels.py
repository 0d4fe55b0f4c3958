"""Which kernel of attention will run, asked without running it; and that a plan takes the planned device's."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from distpatch.profiling.op_costs import Meter
from distpatch.rules.linalg import kept_scores
from distpatch.rules.linalg.kept_scores import keeps_scores, planned
from distpatch.torch_utils.chunk_sizes import ELSEWHERE, kind_of, planned_as, sizes_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASKS: dict[str, Any] = {
    "none": lambda dtype: None,
    "bool": lambda dtype: torch.ones(7, 9, dtype=torch.bool),
    "heads": lambda dtype: torch.zeros(2, 1, 7, 9, dtype=dtype),
    "learned": lambda dtype: torch.zeros(7, 9, dtype=dtype, requires_grad=True),
}


def operands(
    ndim: int = 4,
    d: int = 8,
    e: int = 8,
    heads: tuple[int, int] = (4, 4),
    dtype: torch.dtype = torch.float32,
    **at: Any,
) -> list[Tensor]:
    """Queries, keys and values of 7, 9 and 9 tokens."""
    shapes = [(3, 2, *rest)[5 - ndim :] for rest in ((heads[0], 7, d), (heads[1], 9, d), (heads[1], 9, e))]
    return [torch.empty(shape, dtype=dtype, **at) for shape in shapes]


@pytest.mark.parametrize("mask", MASKS)
def test_as_torch_chooses_on_a_cpu(mask: str) -> None:
    """Never a kernel that keeps scores where we say that none are kept; the other way round, most of them."""
    agreed = 0
    for dtype, ndim, (d, e), heads, gqa, strided, causal in product(
        DTYPES, (3, 4, 5), ((8, 8), (5, 5), (512, 512), (8, 16)), ((4, 4), (4, 2)), (False, True), *[(False, True)] * 2
    ):
        given = MASKS[mask](dtype)
        if (causal and given is not None) or (heads[0] != heads[1] and not gqa):
            continue
        tensors = operands(ndim, d, e, heads, dtype)
        if strided:
            tensors = [torch.stack([t, t], -1)[..., 0] for t in tensors]
        chosen = torch._fused_sdp_choice(*tensors, given, 0.0, causal, enable_gqa=gqa)
        ours = keeps_scores(*tensors, given, causal, gqa)
        assert ours or chosen != SDPBackend.MATH.value, (dtype, ndim, d, e, heads, gqa, strided, causal)
        agreed += ours == (chosen == SDPBackend.MATH.value)
    assert agreed > 100


def test_flags_are_respected() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert keeps_scores(*operands(), None)
        with planned_as("cuda"):
            assert keeps_scores(*operands(), None)
    assert not keeps_scores(*operands(), None)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), planned_as("cuda"):
        assert not keeps_scores(*operands(), None)
        assert keeps_scores(*operands(heads=(4, 2), dtype=torch.bfloat16), None, enable_gqa=True), "flash's alone"


CUDA = {  # what a card since Ampere does with them
    "a VAE's one head of 512": (True, {"d": 512, "e": 512, "heads": (1, 1), "dtype": torch.bfloat16}),
    "in fp32": (True, {"d": 512, "e": 512, "heads": (1, 1)}),
    "in fp64": (False, {"dtype": torch.float64}),
    "heads of odd size": (False, {"d": 5, "e": 5}),
    "heads of odd size in half precision, which flash attention pads": (True, {"d": 5, "e": 5, "dtype": torch.float16}),
    "values of another size": (True, {"d": 8, "e": 16}),
    "without a batch": (False, {"ndim": 3}),
    "grouped queries in half precision": (True, {"heads": (4, 2), "dtype": torch.bfloat16}),
    "grouped queries in fp32": (False, {"heads": (4, 2)}),
}


@pytest.mark.parametrize("name", CUDA)
def test_a_plan_for_cuda(name: str) -> None:
    """Fake tensors, on a CPU, of what CUDA would fuse make no scores, and one launch; of the rest they do."""
    fused, about = CUDA[name]
    gqa = about.get("heads", (1, 1))[0] != about.get("heads", (1, 1))[1]
    with FakeTensorMode(), planned_as("cuda"), torch.no_grad(), Meter() as meter:
        tensors = operands(**about)
        out = planned(F.scaled_dot_product_attention)(*tensors, enable_gqa=gqa)
    assert out.shape == (*tensors[0].shape[:-1], tensors[2].shape[-1]) and out.dtype == tensors[0].dtype
    names = [kernel.name for kernel in meter.kernels]
    assert any("softmax" in kernel for kernel in names) == (not fused), names
    assert meter.launches == 1 or not fused


def test_a_device_that_is_here_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's answer is taken for real tensors of a GPU, and nothing but the answer."""
    asked: list[tuple[Any, ...]] = []

    def choice(*args: Any, **kwargs: Any) -> int:
        asked.append((*args, kwargs))
        return int(answers[len(asked) - 1])

    answers = [SDPBackend.FLASH_ATTENTION.value, SDPBackend.MATH.value]
    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    monkeypatch.setattr(kept_scores, "kind_of", lambda device: "cuda")
    tensors = operands(dtype=torch.float64)
    assert [keeps_scores(*tensors, None, True, True) for _ in answers] == [False, True]
    assert asked[0][3:] == (None, 0.0, True, {"enable_gqa": True})

    def unknown(*args: Any, **kwargs: Any) -> int:
        raise NotImplementedError

    monkeypatch.setattr(torch, "_fused_sdp_choice", unknown)
    assert keeps_scores(*tensors, None)


def test_kinds() -> None:
    cpu = torch.device("cpu")
    with planned_as("cuda"):
        assert kind_of(cpu) == "cuda" and sizes_of(cpu) is ELSEWHERE
        with planned_as("cpu"):
            assert sizes_of(torch.device("cuda")) is not ELSEWHERE
        assert planned(F.relu) is not F.relu
    assert kind_of(cpu) == "cpu" and sizes_of(torch.device("mps")) is ELSEWHERE and planned(F.relu) is F.relu
