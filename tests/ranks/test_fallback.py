"""Operations without a sharded rule: gathered, recorded and warned of; refused where that is asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distpatch
from distpatch.tensor import RULES
from tests.oracle import H, case, random_tensor
from tests.threads import run_ranks

X = (2, 3, H, 5)


def into_plain(x: Tensor) -> Tensor:
    """Writing sharded rows into a replicated tensor gathers them."""
    canvas = torch.zeros(x.shape, dtype=x.dtype)
    canvas[:, 1:] = x[:, :-1]
    canvas.add_(x)
    return canvas


CASES = {
    "sort rows": case(lambda x: torch.sort(x, dim=-2).values, X, fallback="sort"),
    "median": case(lambda x: x.median(dim=2).values, X, fallback="median"),
    "then a convolution": case(lambda x, w: F.conv2d(torch.sort(x, 2).values, w, padding=1), X, (4, 3, 3, 3), fallback="sort"),
    "into a plain tensor": case(into_plain, X, fallback="__setitem__"),
    "loss": case(lambda x, y: F.mse_loss(x, y), X, X, fallback="mse_loss"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fallback(case: Callable[[], None]) -> None:
    case()


class Sorting(nn.Module):
    """Calls an operation without a rule twice, at one line."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.sort(x, dim=-2).values
        return x


def converted(mode: str, world: int = 2) -> list[tuple[Tensor, distpatch.Trace]]:
    x = random_tensor((1, 2, 5, 3))

    def body(rank: int) -> tuple[Tensor, distpatch.Trace]:
        model = distpatch.convert_model(Sorting(), dist.group.WORLD, fallback=mode)
        with distpatch.trace() as t:
            return model(x), t

    return run_ranks(world, body)


def test_warned_once_and_recorded_where() -> None:
    with pytest.warns(UserWarning, match="no sharded rule for sort") as caught:
        results = converted("warn", world=2)
    assert len(caught) == 2, "once for each of the two ranks"
    for value, t in results:
        assert torch.equal(value, random_tensor((1, 2, 5, 3)).sort(dim=-2).values)
        (record,) = t.fallbacks
        assert (record.op, record.count, record.bytes) == ("sort", 2, 2 * 30 * 8)
        assert record.where.startswith("test_fallback.py:")
        assert "(1, 2, 5, 3)" in record.shapes
        assert "sort" in t.table()


def test_allowed_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    for _, t in converted("allow"):
        assert [record.op for record in t.fallbacks] == ["sort"]
    assert not recwarn.list


def test_refused_by_name() -> None:
    with pytest.raises(distpatch.UnsupportedOpError, match=r"sort has no sharded rule .*\(1, 2, 5, 3\)"):
        converted("error")


WRITES: dict[str, Callable[[Tensor], object]] = {
    "cumsum_": lambda x: x.cumsum_(2),
    "__setitem__": lambda x: x.__setitem__((slice(None), slice(None), 0), 0.0),
    "index_fill_": lambda x: x.index_fill_(2, torch.tensor([0]), 1.0),
    "sort": lambda x: torch.sort(x, dim=2, out=(x, torch.empty(0, dtype=torch.long))),
}
UNADDRESSED: dict[str, Callable[[Tensor], object]] = {
    "numpy": lambda x: x.numpy(),
    "data_ptr": lambda x: x.data_ptr(),
    "untyped_storage": lambda x: x.untyped_storage(),
    "as_strided": lambda x: x.as_strided((2,), (1,)),
}


@pytest.mark.parametrize("name", [*WRITES, *UNADDRESSED])
def test_refused_always(name: str) -> None:
    """Writing through a gathered copy would be lost, and there is no one address: named errors."""
    call = {**WRITES, **UNADDRESSED}[name]

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
            torch.sort(x)

    run_ranks(2, body)


def test_register_rule() -> None:
    """A rule of one's own takes the place of the fallback."""

    def body(rank: int) -> tuple[Tensor, distpatch.Trace]:
        x = distpatch.shard(random_tensor((1, 2, 6, 3)), dist.group.WORLD)
        with distpatch.trace() as t:
            return distpatch.gather(torch.kthvalue(x, 2, dim=-1)[0]), t

    def kth_of_columns(input: distpatch.PatchTensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
        assert dim % input.ndim == input.ndim - 1 != input.rows.dim
        parts = torch.kthvalue(input.local, k, dim=dim)
        values, indices = (distpatch.PatchTensor(part, input.rows, input.region) for part in parts)
        return values, indices

    before = RULES.pop(torch.kthvalue, None)
    try:
        assert distpatch.register_rule(torch.kthvalue)(kth_of_columns) is kth_of_columns
        results = run_ranks(3, body)
    finally:
        del RULES[torch.kthvalue]
        if before is not None:
            RULES[torch.kthvalue] = before
    for value, t in results:
        assert not t.fallbacks
        assert torch.equal(value, random_tensor((1, 2, 6, 3)).kthvalue(2, dim=-1).values)


def test_register_rule_for_a_function_of_ones_own() -> None:
    def darken(x: Tensor, by: float) -> Tensor:
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(darken, (x,), x, by)
        return x - by

    @distpatch.register_rule(darken)
    def _(x: distpatch.PatchTensor, by: float) -> Tensor:
        return distpatch.PatchTensor(darken(x.local, by), x.rows, x.region)

    case(lambda x: darken(x, 0.5), X)()
