"""Operations without a sharded rule: gathered, recorded and warned of; refused where that is asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

import distpatch
from distpatch.tensor.rule_table import RULES
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

X = (2, 3, H, 5)


def by_rows(x: Tensor) -> Tensor:
    """Asks, as functions of torch do, what it goes through for a rule: here rows, which are copies."""
    rows = [x.select(2, row) for row in range(x.shape[2])]
    return handle_torch_function(by_rows, rows, x) if has_torch_function(rows) else sum(rows, x.new_zeros(()))


CASES = {
    "asked for by its rows": case(by_rows, X, fallback="by_rows"),
    "trapezoid over rows": case(lambda x: torch.trapezoid(x, dim=2), X, fallback="trapezoid"),
    "as tall as the input": case(lambda x: torch.renorm(x, 2, 2, 1.0), X, fallback="renorm"),
    "all of it": case(lambda x: torch.cov(x[0, 0]), X, fallback="cov"),
    "fft": case(lambda x: torch.real(torch.fft.fftn(x)), X, fallback="fft_fftn"),
    "several results": case(lambda x: torch.histogram(x.detach(), 4), X, fallback="histogram"),
    "two sharded": case(lambda x, y: torch.linalg.cross(x, y, dim=1), X, X, sharded=2, fallback="linalg_cross"),
    "then a convolution": case(
        lambda x, w: F.conv2d(torch.renorm(x, 2, 2, 1.0), w, padding=1), X, (4, 3, 3, 3), fallback="renorm"
    ),
    "width": case(lambda x: torch.renorm(x, 2, 3, 1.0), (2, 3, 5, H), dim=-1, fallback="renorm"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fallback(case: Callable[[], None]) -> None:
    case()


class Unruly(nn.Module):
    """Calls an operation without a rule twice, at one line."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.renorm(x, 2, 2, 1.0)
        return x


def converted(mode: str, world: int = 2) -> list[tuple[Tensor, distpatch.Trace]]:
    x = random_tensor((1, 2, 5, 3))

    def body(rank: int) -> tuple[Tensor, distpatch.Trace]:
        model = distpatch.convert_model(Unruly(), dist.group.WORLD, fallback=mode)
        with distpatch.trace() as t:
            return model(x), t

    return run_ranks(world, body)


def test_warned_once_and_recorded_where() -> None:
    with pytest.warns(UserWarning, match="no sharded rule for renorm") as caught:
        results = converted("warn", world=2)
    assert len(caught) == 2, "once for each of the two ranks"
    for value, t in results:
        assert torch.equal(value, Unruly()(random_tensor((1, 2, 5, 3))))
        (record,) = t.fallbacks
        assert (record.op, record.count, record.bytes) == ("renorm", 2, 2 * 30 * 8)
        assert record.where.startswith("test_fallback.py:")
        assert "(1, 2, 5, 3)" in record.shapes
        assert "renorm" in t.table()


def test_allowed_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    for _, t in converted("allow"):
        assert [record.op for record in t.fallbacks] == ["renorm"]
    assert not recwarn.list


def test_refused_by_name() -> None:
    with pytest.raises(distpatch.UnsupportedOpError, match=r"renorm has no sharded rule .*\(1, 2, 5, 3\)"):
        converted("error")


UNADDRESSED: dict[str, Callable[[Tensor], object]] = {
    "numpy": lambda x: x.numpy(),
    "data_ptr": lambda x: x.data_ptr(),
    "untyped_storage": lambda x: x.untyped_storage(),
    "as_strided": lambda x: x.as_strided((2,), (1,)),
}


@pytest.mark.parametrize("name", UNADDRESSED)
def test_refused_always(name: str) -> None:
    """There is no one address: named errors."""
    call = UNADDRESSED[name]

    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD)
        before = x.local.clone()
        with pytest.raises(distpatch.UnsupportedOpError, match=name):
            call(x)
        assert torch.equal(x.local, before)

    run_ranks(2, body)


def test_below_the_table_is_refused() -> None:
    """What reaches the tensor without a torch function is named, never run on the local rows."""

    def body(rank: int) -> None:
        x = distpatch.shard(random_tensor((1, 2, 5, 3)), dist.group.WORLD)
        with pytest.raises(distpatch.UnsupportedOpError, match="aten"), torch._C.DisableTorchFunctionSubclass():
            torch.renorm(x, 2, 2, 1.0)

    run_ranks(2, body)


def test_register_rule() -> None:
    """A rule of one's own takes the place of the fallback."""
    x = random_tensor((1, 2, 6, 3))

    def body(rank: int) -> tuple[Tensor, distpatch.Trace]:
        with distpatch.trace() as t:
            return distpatch.gather(torch.trapezoid(distpatch.shard(x, dist.group.WORLD), dim=-1)), t

    def across(y: distpatch.PatchTensor, dim: int) -> Tensor:
        assert dim % y.ndim > y.row_layout.dim
        return distpatch.PatchTensor(torch.trapezoid(y.local, dim=dim), y.row_layout, y.region)

    assert torch.trapezoid not in RULES
    try:
        assert distpatch.register_rule(torch.trapezoid)(across) is across
        results = run_ranks(3, body)
    finally:
        del RULES[torch.trapezoid]
    for value, t in results:
        assert not t.fallbacks
        assert torch.equal(value, torch.trapezoid(x, dim=-1))


def test_register_rule_for_a_function_of_ones_own() -> None:
    def darken(x: Tensor, by: float) -> Tensor:
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(darken, (x,), x, by)
        return x - by

    @distpatch.register_rule(darken)
    def _(x: distpatch.PatchTensor, by: float) -> Tensor:
        return distpatch.PatchTensor(darken(x.local, by), x.row_layout, x.region)

    case(lambda x: darken(x, 0.5), X)()
