"""The autoencoders of the table, on one device and converted on ranks that are threads."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import distpatch
from distpatch.torch_utils.tree import tensors_in
from tests.support.oracle import mesh_of
from tests.support.threads import run_ranks
from tests.support.zoo.autoencoders import AUTOENCODERS

Runs = dict[tuple[str, int], list[Tensor]]  # results by call and height


class OwnProcess(TorchFunctionMode):
    """What a thread lacks that a process has: a random generator of its own, for noise that models inject.

    ``precise``: what a model of fp64 casts to fp32 is kept in fp64, so that no difference can hide in it.
    """

    def __init__(self, precise: bool) -> None:
        super().__init__()
        self.precise = precise
        self.generator = torch.Generator().manual_seed(11)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in {torch.randn, torch.rand} and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": self.generator}
        if self.precise and func in {torch.Tensor.float, torch.Tensor.to} and args[0].dtype == torch.float64:
            asked = [*args[1:], *kwargs.values()]
            if func is torch.Tensor.float or any(a is torch.float32 for a in asked):
                return args[0]
        return func(*args, **kwargs)


def result_of(model: nn.Module, name: str, call: str, rows: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    entry = AUTOENCODERS[name]
    with torch.no_grad(), OwnProcess(precise=(dtype or entry.dtype) == torch.float64):
        return list(tensors_in(entry.calls[call](model, entry.input(call, rows, dtype))))


def is_accepted(name: str, call: str, rows: int) -> bool:
    """Whether diffusers runs it: on a model of its own, since a failed run may leave its caches behind."""
    try:
        results = result_of(AUTOENCODERS[name].build(), name, call, rows)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return bool(results[0].numel() > 0 and results[0].any())  # tiles larger than the image give zeros


@lru_cache
def accepted_heights(name: str, call: str) -> tuple[int, ...]:
    """The candidates that diffusers accepts, and the smallest height that it does."""
    entry = AUTOENCODERS[name]
    largest = 6 if call == "decode" or entry.scale == 1 else 4 * entry.scale
    smallest = next((rows for rows in range(1, largest + 1) if is_accepted(name, call, rows)), None)
    heights = {rows for rows in entry.candidates(call) if is_accepted(name, call, rows)}
    return tuple(sorted(heights | ({smallest} if smallest else set()), reverse=True))


@dataclass
class Comparison:
    """``error``: the largest difference of any rank, over the largest value of the tensor."""

    error: float = 0.0
    fallbacks: int = 0
    runs: int = 0


def run_all(model: nn.Module, name: str, cases: list[tuple[str, int]], dtype: torch.dtype | None = None) -> Runs:
    return {(call, rows): result_of(model, name, call, rows, dtype) for call, rows in cases}


def compare(
    name: str,
    cases: list[tuple[str, int]],
    world: int,
    dtype: torch.dtype | None = None,
    timeout: float = 60,
    mesh: tuple[int, ...] = (),
) -> Comparison:
    """One model, converted once, makes these calls, with ``fallback="error"``; on every rank each is compared.

    ``mesh``: of ranks along height and width, in which some may be gathered.
    """
    model = AUTOENCODERS[name].build(dtype)
    expected = run_all(copy.deepcopy(model), name, cases, dtype)

    def body(rank: int) -> tuple[Runs, int]:
        how: Any = (
            {"group": mesh_of(mesh), "dim": (-2, -1)} if mesh else {"group": dist.group.WORLD, "fallback": "error"}
        )
        tiled = getattr(model, "use_tiling", False)
        converted = distpatch.convert_model(copy.deepcopy(model), tiled=tiled, **{"fallback": "allow", **how})
        with distpatch.trace() as t:
            return run_all(converted, name, cases, dtype), len(t.fallbacks)

    outcomes = run_ranks(world, body, timeout=timeout)
    result = Comparison(fallbacks=sum(count for _, count in outcomes), runs=len(cases))
    for case, wanted in expected.items():
        for results, _ in outcomes:
            result.error = max(result.error, _error(results[case], wanted, outcomes[0][0][case], f"{name} {case}"))
    return result


def _error(got: list[Tensor], wanted: list[Tensor], first: list[Tensor], where: str) -> float:
    assert len(got) == len(wanted) > 0, where
    worst = 0.0
    for value, right, other in zip(got, wanted, first, strict=True):
        assert type(value) is Tensor, f"{where}: a result of type {type(value).__name__} was not gathered"
        assert (value.shape, value.dtype) == (right.shape, right.dtype), where
        assert value.isfinite().all(), where
        assert torch.equal(value, other), f"{where}: other bits than on rank 0"
        difference = (value - right).abs().max() / right.abs().max().clamp(min=1e-30)
        worst = max(worst, difference.item())
    return worst
