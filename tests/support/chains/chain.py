"""Chains of operations as data: Python statements over sharded and plain inputs, run and compared.

>>> compare(Chain(2, (Input((2, 3, 7, 5), 2, (0, 0, 7)), Input((4, 3, 3, 3))), ("x = F.conv2d(x, t1)",)))

A step is a statement about ``x`` (at first a copy of the first input), ``z`` (a tensor that was kept: at first
that input) and the inputs ``t0``, ``t1``, … What a chain gives is ``x`` and ``z`` after the last step.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import CodeType
from typing import Any

import einops
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

import distpatch
from distpatch.comm.communicator import communicator
from distpatch.layout.rows import Bounds, RowLayout
from distpatch.tensor import options
from distpatch.tensor.patch_tensor import shard_in
from distpatch.tensor.region import Region
from distpatch.torch_utils.tree import tensors_in
from tests.support import oracle
from tests.support.threads import run_ranks
from tests.support.transports.late import late

STABLE = 1e-12
DENSE = """
x = x.clone(memory_format=torch.contiguous_format)
x.requires_grad and x.register_hook(lambda grad: grad.clone(memory_format=torch.contiguous_format))
"""
WRITES = re.compile(r"\w_\(|[-+*/]=|\] =|out=|inplace=|\[0\], z =")  # what may be refused by name


@dataclass(frozen=True)
class Input:
    """A random tensor; replicated where it has no ``dim``. ``last``: channels last in memory."""

    shape: tuple[int, ...]
    dim: int | None = None
    bounds: Bounds = ()
    last: bool = False

    def __str__(self) -> str:
        sharded = "" if self.dim is None else f", {self.dim}, {self.bounds}"
        return f"Input({self.shape}{sharded}{', last=True' * self.last})"

    def tensor(self, seed: int) -> Tensor:
        tensor = oracle.random_tensor(self.shape, seed)
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return tensor.contiguous(memory_format=formats[tensor.ndim]) if self.last else tensor


@dataclass(frozen=True)
class Chain:
    world: int
    inputs: tuple[Input, ...]
    steps: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Code, to be pasted into the table of regressions."""
        return f"Chain({self.world}, ({', '.join(map(str, self.inputs))},), {self.steps!r})"

    def then(self, inputs: list[Input], step: str) -> Chain:
        return replace(self, inputs=(*self.inputs, *inputs), steps=(*self.steps, step))

    @property
    def writes(self) -> bool:
        return any(map(WRITES.search, self.steps))

    def run(self, *tensors: Tensor) -> dict[str, Any]:
        names: dict[str, Any] = {"torch": torch, "F": F, "einops": einops, "x": tensors[0].clone(), "z": tensors[0]}
        names.update({f"t{index}": tensor for index, tensor in enumerate(tensors)})
        for step in self.steps:
            exec(_compiled(step), names)
        return {name: names[name] for name in "xz"}

    def plain(self, nudge: float = 0.0) -> oracle.Result:
        """Of the unsharded run; ``nudge``: a relative change of the inputs."""
        tensors = [item.tensor(seed) * (1 + nudge) for seed, item in enumerate(self.inputs)]
        return oracle.run(self.run, tensors, list, rows=0)

    def sharded(self) -> tuple[list[oracle.Result], set[str]]:
        """Of every rank, and which operations were gathered."""
        tensors = [item.tensor(seed) for seed, item in enumerate(self.inputs)]

        def distribute(leaves: list[Tensor]) -> list[Tensor]:
            region = Region(communicator(dist.group.WORLD), replace(options.DEFAULT, fallback="allow"))
            return [
                leaf if item.dim is None else shard_in(region, leaf, RowLayout(item.dim, item.bounds))
                for leaf, item in zip(leaves, self.inputs, strict=True)
            ]

        def body(rank: int) -> tuple[oracle.Result, set[str]]:
            with distpatch.trace() as t:
                result = oracle.run(self.run, tensors, distribute, rows=0)
            return result, {record.op for record in t.fallbacks}

        with late():
            ranks = run_ranks(self.world, body, keep=True)
        return [result for result, _ in ranks], ranks[0][1]


@lru_cache(maxsize=4096)
def _compiled(step: str) -> CodeType:
    return compile(step, step, "exec")


@dataclass
class Count:
    """What became of the chains of a session."""

    compared: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    unstable: int = 0
    with_fallback: int = 0
    gathered: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"{self.compared} chains compared with the unsharded run, {self.with_fallback} of them with a fallback "
            f"({dict(self.gathered.most_common())}); refused by name: {self.refused.total()}; "
            f"of unstable values: {self.unstable}"
        )


count = Count()


def compare(chain: Chain) -> None:
    """Outputs and the gradients of all inputs, to ``TOLERANCE`` of the largest value of each.

    Writing may be refused by name. Where the unsharded values themselves change by more than that when the
    inputs change in their last bits, nothing is compared.
    """
    right = chain.plain()
    try:
        ranks, gathered = chain.sharded()
    except distpatch.UnsupportedOpError as error:
        if not chain.writes:
            raise
        count.refused[str(error).split(" ", 1)[0]] += 1
        return
    count.compared += 1
    count.with_fallback += bool(gathered)
    count.gathered.update(gathered)
    try:
        oracle.compare([_scaled(result, right) for result in ranks], _scaled(right, right), where=str(chain))
    except AssertionError:
        if not is_stable(chain, right):
            count.unstable += 1
            return
        raise


def reduced(chain: Chain) -> Chain:
    """The chain without the steps that it fails without."""
    for at in reversed(range(len(chain.steps))):
        shorter = replace(chain, steps=chain.steps[:at] + chain.steps[at + 1 :])
        if _fails(shorter):
            return reduced(shorter)
    return chain


def _fails(chain: Chain) -> bool:
    try:
        right = chain.plain()
    except Exception:
        return False
    try:
        compare(chain)
    except Exception:
        return is_finite(right)
    return False


def is_stable(chain: Chain, right: oracle.Result) -> bool:
    """Whether torch gives the same for inputs changed in their last bits, and for other strides between the steps.

    torch 2.13's batch norm has wrong gradients for a channels-last image of one column with odd strides.
    """
    others = [chain.plain(nudge) for nudge in (2.0**-50, -(2.0**-49))]
    if not chain.writes:
        dense = tuple(line for step in chain.steps for line in (step, DENSE))
        inputs = tuple(replace(item, last=False) for item in chain.inputs)
        others.append(replace(chain, inputs=inputs, steps=dense).plain())
    try:
        oracle.compare([_scaled(other, right) for other in others], _scaled(right, right), "", STABLE, same_bits=False)
    except AssertionError:
        return False
    return True


def is_finite(result: oracle.Result) -> bool:
    tensors = tensors_in((result.outputs, result.grads, result.inference))
    return all(math.isfinite(t.detach().abs().sum().item()) for t in tensors)


def _scaled(result: oracle.Result, right: oracle.Result) -> oracle.Result:
    """Each tensor divided by the largest value of the right one, if that is more than 1."""

    def scaled(values: list[Any], wanted: list[Any]) -> list[Any]:
        assert len(values) == len(wanted)
        return [
            value if value is None or w is None or not w.numel() else value / max(1.0, w.abs().max().item())
            for value, w in zip(values, wanted, strict=True)
        ]

    kinds = ("outputs", "grads", "inference")
    return oracle.Result(*(scaled(getattr(result, kind), getattr(right, kind)) for kind in kinds))
