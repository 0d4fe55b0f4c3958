"""``Meter``: FLOPs, bytes and calls of a run, counted by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch import trace
from distpatch.lazy.row_patches import chosen_by, patches_to_run
from distpatch.profiling.op_costs import FLOPS, Kernel, Meter, gathered, representatives
from tests.support.oracle import random_tensor

BYTES = 8  # of fp64


def costs(meter: Meter) -> dict[str, tuple[int, int, int]]:
    return {op: (cost.calls, cost.flops, cost.moved_bytes) for op, cost in meter.costs().items()}


def test_by_the_torch_function_that_asked() -> None:
    x, w = random_tensor((2, 3, 8, 8)), random_tensor((4, 3, 3, 3))
    with Meter() as meter, torch.no_grad():
        y = F.conv2d(x, w, padding=1)
        y = F.conv2d(x, w, padding=1)
        F.layer_norm(y, (8, 8))  # several operators
        y @ y.transpose(2, 3)
    found = costs(meter)
    assert found["conv2d"] == (2, 2 * 2 * 2 * 4 * 64 * 27, 2 * BYTES * (x.numel() + w.numel() + y.numel()))
    assert found["__matmul__" if "__matmul__" in found else "matmul"][1] == 2 * 8 * 8 * 8 * 8
    assert found["layer_norm"][0] == 1 and found["layer_norm"][2] > 0
    assert "transpose" not in found, "views move nothing"
    assert meter.peak_bytes >= 2 * y.nbytes


def test_attention_of_the_cpu() -> None:
    q, k = random_tensor((1, 2, 16, 4)), random_tensor((1, 2, 24, 4))
    with Meter() as meter, torch.no_grad():
        F.scaled_dot_product_attention(q, k, k)
    assert costs(meter)["scaled_dot_product_attention"][1] == 2 * 2 * (2 * 16 * 24 * 4)


def test_what_is_written_is_not_read_and_what_is_expanded_is_read_once() -> None:
    x = random_tensor((10, 10))
    one = random_tensor((1, 1)).expand(10, 10)
    with Meter() as meter:
        x.copy_(one)
        x.fill_(2.0)
        torch.add(x, one, out=x)
        torch.empty(1000)
        x.add_(1)
    found = {op: cost[2] for op, cost in costs(meter).items()}
    assert found == {"copy_": 101 * BYTES, "fill_": 100 * BYTES, "add": 101 * BYTES, "add_": 200 * BYTES}


def test_replicated() -> None:
    x = random_tensor((4, 4))
    with Meter() as meter:
        x @ x
        gathered()  # outside any function: of none
        x @ x
    assert [kernel.replicated for kernel in meter.kernels] == [True]


def test_backward_has_a_name() -> None:
    x = random_tensor((4, 4)).requires_grad_()
    y = (x @ x).sum()
    with Meter() as meter:
        y.backward()
    assert costs(meter)["backward"][1] == 2 * 2 * 4**3


def test_timed() -> None:
    x = random_tensor((64, 64))
    with trace(measure=True) as t:
        x @ x
    (cost,) = t.ops().values()
    assert 0 < cost.seconds < 10 and cost.flops == t.flops == 2 * 64**3
    assert t.to_dict()["ops"][0]["seconds"] == cost.seconds
    with trace() as t:
        x @ x
    assert (t.flops, t.peak_bytes, t.ops()) == (None, None, {})


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_few(count: int) -> None:
    assert list(patches_to_run(range(count))) == list(range(count))
    with chosen_by(representatives):
        chosen = list(patches_to_run(range(count)))
        alike = list(patches_to_run(range(count), last_too=True))
    assert chosen == (list(range(count)) if count <= 3 else [0, 1, count - 1])
    assert alike == (list(range(count)) if count <= 2 else [0, count - 1])


@pytest.mark.parametrize("last_too", [False, True])
def test_few_counts_all(last_too: bool) -> None:
    x = random_tensor((4, 4))

    def run(*sizes: int) -> dict[Kernel, int]:
        with Meter() as meter:
            for _ in patches_to_run(range(sizes[0]), last_too=last_too):
                y: Tensor = x * 2
                for _ in patches_to_run(range(sizes[1])):
                    y = y + 1
        return dict(meter.kernels)

    whole = run(7, 5)
    with chosen_by(representatives):
        assert run(7, 5) == whole
        with pytest.raises(KeyError):
            for _ in patches_to_run(range(9)):
                raise KeyError
        assert run(7, 5) == whole, "a piece that failed is forgotten"


@pytest.mark.parametrize("kernel", ["efficient_attention", "flash_attention", "cudnn_attention"])
def test_grouped_queries_count_as_their_keys_repeated(kernel: str) -> None:
    query, key = torch.ones(2, 6, 5, 4), torch.ones(2, 2, 7, 4)
    repeated = key.repeat(1, 3, 1, 1)
    forward, backward = (
        FLOPS[getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{end}")] for end in ("", "_backward")
    )
    assert forward(query, key, key) == forward(query, repeated, repeated) == 2 * 2 * (2 * 6 * 5 * 7 * 4)
    assert backward(query, query, key, key) == backward(query, query, repeated, repeated) > forward(query, key, key)
