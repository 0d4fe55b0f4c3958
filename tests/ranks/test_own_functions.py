"""Functions of one's own: the code of docs/own-functions.md, and what becomes of those that nobody registered."""

from __future__ import annotations

import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from distpatch.errors import UnsupportedOpError
from distpatch.rules.core.registry import keys
from distpatch.tensor.rule_table import RULES
from tests.support.oracle import H, case, check, random_tensor
from tests.support.threads import run_ranks

X = (2, 3, H, 5)
CHANNELS = (3, 1, 1)


def page() -> types.ModuleType:
    """The code of the page, as one module."""
    file = Path(__file__).parents[2] / "docs" / "own-functions.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL))
    module = types.ModuleType("own_functions")
    sys.modules[module.__name__] = module
    exec(compile(code, str(file), "exec"), vars(module))
    return module


own = page()
mine = torch.ops.mine

CASES = {
    "operator": case(lambda x: own.scaled_tanh(x, 2.0), X),
    "operator, packet": case(lambda x: mine.scaled_tanh(x, 2.0) + mine.scaled_tanh(x, scale=3.0), X),
    "operator, overload": case(lambda x: mine.scaled_tanh.default(x, 2.0), X),
    "operator on a copy of rows": case(lambda x: own.scaled_tanh(x[:, :, 0], 2.0), X),
    "operator on merged rows": case(lambda x: own.scaled_tanh(x.flatten(0, 2), 2.0), X),
    "autograd function": case(lambda x, b: own.Swish.apply(x, b), X, CHANNELS),
    "autograd function of two layouts": case(lambda x, b: own.Swish.apply(x, b), X, X, sharded=2),
    "autograd function in between": case(
        lambda x, w: F.conv2d(own.Swish.apply(F.conv2d(x, w, padding=1), w[0, :1, :1, :1]), w, padding=1),
        X,
        (3, 3, 3, 3),
    ),
    "Python function": case(lambda x, y: own.gated(x.detach(), y.detach()), X, X, sharded=2),
    "Python function, replicated operand": case(lambda x, g: own.gated(x.detach(), g.detach()), X, CHANNELS),
    "rule of torch functions": case(
        lambda *qkv: own.attention(*(t.detach() for t in qkv)), (2, H, 4), (2, H, 4), (2, H, 4), sharded=3
    ),
    "rule on rows": case(own.blur_columns, X),
    "rule on columns": case(own.blur_columns, (2, 3, 5, H), dim=-1),
    "rule that does not apply": case(own.blur_columns, (H, 5), fallback="blur_columns"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_page(case: Callable[[], None]) -> None:
    case()


def test_nothing_is_sent_for_an_element_wise_function() -> None:
    def body(rank: int) -> list[object]:
        x = distpatch.shard(random_tensor((2, 3, 7, 5)), dist.group.WORLD)
        with distpatch.trace() as t:
            own.scaled_tanh(own.gated(own.Swish.apply(x, random_tensor(CHANNELS)), x), 2.0)
        return [*t.records, *t.fallbacks]

    assert run_ranks(3, body) == [[]] * 3


def refuses_nothing(x: Tensor) -> Tensor:
    """A kernel that cannot be launched for no rows."""
    assert x.numel() > 0
    return x * 2


def test_idle_ranks_launch_the_kernel_for_a_blank_row(forgotten: None) -> None:
    check(distpatch.register_pointwise(refuses_nothing), X, heights=(2, 1))


def test_a_function_that_is_not_element_wise_is_noticed(forgotten: None) -> None:
    halved = distpatch.register_pointwise(lambda x: x[:, :, ::2])

    def body(rank: int) -> None:
        with pytest.raises(UnsupportedOpError, match="registered as element-wise"):
            halved(distpatch.shard(random_tensor((2, 3, 8, 5)), dist.group.WORLD))

    run_ranks(2, body)


def test_all_names_of_an_operator_have_the_rule() -> None:
    packet = mine.scaled_tanh
    for name in (own.scaled_tanh, packet, packet.default):
        assert set(keys(name)) == {packet, packet.default}
    assert keys(torch.ops.aten.add.Tensor) == [torch.ops.aten.add.Tensor]
    assert torch.ops.aten.add.Tensor in keys(torch.ops.aten.add)


@pytest.fixture
def forgotten() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@torch.library.custom_op("mine::sharpen", mutates_args=())
def sharpen(x: Tensor) -> Tensor:
    return x * 2 - x.roll(1, 2)


@torch.library.custom_op("mine::darken_", mutates_args=("x",))
def darken_(x: Tensor, by: float) -> None:
    x.sub_(by)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 2


def test_an_unregistered_operator_is_gathered_and_reported() -> None:
    x = random_tensor((2, 3, 7, 5))

    def body(rank: int) -> distpatch.Trace:
        with distpatch.trace() as t:
            for call in (sharpen, mine.sharpen):
                assert torch.equal(distpatch.gather(call(distpatch.shard(x, dist.group.WORLD))), sharpen(x))
        return t

    with pytest.warns(UserWarning, match=r"no sharded rule for mine\.sharpen"):
        for t in run_ranks(2, body):
            assert [record.op for record in t.fallbacks] == ["mine.sharpen.default", "mine.sharpen"]
            assert all(record.where.startswith("test_own_functions.py") for record in t.fallbacks)


@pytest.mark.parametrize("call", [darken_, mine.darken_, mine.darken_.default], ids=["itself", "packet", "overload"])
def test_what_an_unregistered_operator_writes_is_written_back(call: Callable[..., None]) -> None:
    def darkened(x: Tensor) -> Tensor:
        y = x.detach() * 1
        call(y, 0.5)
        return y

    check(darkened, X, fallback="mine.darken_" if call is mine.darken_ else "mine.darken_.default")


def test_a_registered_operator_that_writes_writes_to_the_rows(forgotten: None) -> None:
    distpatch.register_pointwise(darken_)

    def darkened(x: Tensor) -> Tensor:
        y = x.detach() * 1
        darken_(y, 0.5)
        mine.darken_(y[:, :1], by=0.25)
        return y

    check(darkened, X)


def test_an_unregistered_autograd_function_runs_on_sharded_tensors() -> None:
    check(Scale.apply, X)


def test_register_rule_for_an_autograd_function(forgotten: None) -> None:
    seen = []

    @distpatch.register_rule(Scale)
    def _(x: distpatch.PatchTensor) -> Tensor:
        seen.append(x.shape)
        return x * 2

    check(Scale.apply, X, heights=(7,))
    assert (2, 3, 7, 5) in seen


@pytest.mark.parametrize("size", [(2, 2, 0), (3, 1, 1), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_the_window_operation_of_contributing(dim: int, size: tuple[int, ...]) -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"   ```python\n(.*?)   ```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(textwrap.dedent(code), "CONTRIBUTING.md", "exec"), names)
    my_max_pool = names["my_max_pool"]
    shape = [2, 3, 8, 6]
    shape[dim] = H
    try:
        check(lambda x: my_max_pool(x, *size), tuple(shape), dim=dim, heights=(7, 2), p2p=1)
    finally:
        del RULES[my_max_pool]
