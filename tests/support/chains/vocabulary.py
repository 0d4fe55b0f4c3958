"""The operations that chains are made of: each draws a statement with parameters for the present ``x``."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import einops
from torch import Tensor

from distpatch.layout.rows import even_bounds
from tests.support.chains.chain import Chain, Input, is_finite

LARGEST = 4000  # elements of an intermediate result
SIZES = (1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8)
REFUSALS = (RuntimeError, ValueError, IndexError, NotImplementedError, einops.EinopsError, Warning)

Op = Callable[["Draw", Tensor], str]
FAMILIES: dict[str, list[Op]] = {}


class Misfit(Exception):
    """The operation has no parameters for this shape."""


class Draw:
    """Random parameters, and the inputs that a step adds."""

    def __init__(self, rng: random.Random, world: int, inputs: int) -> None:
        self.rng, self.world, self.first = rng, world, inputs
        self.inputs: list[Input] = []

    def int(self, lo: int, hi: int) -> int:
        return self.rng.randint(lo, max(lo, hi))

    def of(self, *choices: Any) -> Any:
        if not choices:
            raise Misfit
        return self.rng.choice(choices)

    def maybe(self) -> bool:
        return self.rng.random() < 0.5

    def each(self, count: int, lo: int, hi: int) -> tuple[int, ...]:
        return tuple(self.int(lo, hi) for _ in range(count))

    def dim(self, x: Tensor) -> int:
        """A dim of ``x``, from the front or from the back."""
        if not x.ndim:
            raise Misfit
        return self.int(-x.ndim, x.ndim - 1)

    def dims(self, x: Tensor) -> tuple[int, ...]:
        return tuple(sorted(self.rng.sample(range(x.ndim), self.int(1, min(x.ndim, 3))))) if x.ndim else self.of()

    def spatial(self, x: Tensor, least: int = 1) -> int:
        return x.ndim - 2 if least <= x.ndim - 2 <= 3 else self.of()

    def divisor(self, n: int) -> int:
        return self.of(*(d for d in range(1, n + 1) if n % d == 0))

    def shape(self, numel: int) -> tuple[int, ...]:
        sizes = []
        while numel > 1 or len(sizes) < 2:
            sizes.append(self.divisor(numel))
            numel //= sizes[-1]
            if len(sizes) == 4:
                sizes.append(numel)
                break
        self.rng.shuffle(sizes)
        return tuple(sizes)

    def plain(self, *shape: int) -> str:
        """A weight: seldom a sharded one."""
        return self._add(self.sharded(shape) if shape and self.rng.random() < 0.05 else Input(shape))

    def operand(self, shape: Sequence[int]) -> str:
        """Plain, or sharded along any dim with any bounds."""
        return self._add(self.sharded(tuple(shape)) if shape and self.maybe() else Input(tuple(shape)))

    def sharded(self, shape: tuple[int, ...]) -> Input:
        dims = [d for d in (-2, -2, -2, -1, *range(len(shape))) if d >= -len(shape)]
        dim = self.of(*dims) % len(shape)
        rows, kind = shape[dim], self.rng.random()
        if kind < 0.2:
            bounds = even_bounds(rows, self.world)
        elif kind < 0.35:
            owner = self.int(1, self.world)
            bounds = (*[0] * owner, *[rows] * (self.world + 1 - owner))
        else:
            bounds = (0, *sorted(self.int(0, rows) for _ in range(self.world - 1)), rows)
        return Input(shape, dim, bounds, last=len(shape) in {4, 5} and self.rng.random() < 0.25)

    def broadcastable(self, x: Tensor) -> str:
        """Of the shape of ``x``, or of one that broadcasts to it."""
        shape = [1 if self.rng.random() < 0.2 else n for n in x.shape]
        return self.operand(shape[self.int(0, max(x.ndim - 1, 0)) if self.rng.random() < 0.2 else 0 :])

    def slice(self, n: int) -> str:
        """Rows of a dim of ``n``; seldom all of them."""
        start, stop, step = self.int(-n, n), self.int(-n - 1, n + 1), self.of(1, 1, 1, 2, 3)
        return self.of(
            ":", f"{start}:", f":{stop}", f"{start}:{stop}", f"::{step}", f"{start}::{step}", f":{stop}:{step}"
        )

    def rows(self, n: int, distinct: bool = False) -> list[int]:
        if distinct:
            return self.rng.sample(range(n), self.int(1, n))
        return [self.int(-n, n - 1) for _ in range(self.int(1, min(2 * n, 6)))]

    def _add(self, item: Input) -> str:
        self.inputs.append(item)
        return f"t{self.first + len(self.inputs) - 1}"


def draw_chain(rng: random.Random, families: Sequence[str] = ()) -> Chain:
    """A random chain that torch itself can run, forward and backward; with fewer steps where few fit."""
    families = families or list(FAMILIES)
    world = rng.choice((1, 2, 2, 3, 3, 4))
    d = Draw(rng, world, 0)
    shape = [rng.choice(SIZES) for _ in range(rng.choice((1, 2, 3, 3, 4, 4, 4, 4, 4, 5)))]
    while math.prod(shape) > 1200:
        shape[shape.index(max(shape))] //= 2
    chain = Chain(world, (d.sharded(tuple(shape)),))
    result = _run(chain)
    assert result is not None
    for _ in range(rng.randint(3, 8)):
        for _attempt in range(8):
            drawn = _draw_step(rng, rng.choice(families), chain, result)
            if drawn is not None:
                chain, result = drawn
                break
    return chain


def _draw_step(rng: random.Random, family: str, chain: Chain, x: Tensor) -> tuple[Chain, Tensor] | None:
    d = Draw(rng, chain.world, len(chain.inputs))
    try:
        step = rng.choice(FAMILIES[family])(d, x)
    except Misfit:
        return None
    longer = chain.then(d.inputs, step)
    result = _run(longer)
    return None if result is None or not 0 < result.numel() <= LARGEST else (longer, result)


def _run(chain: Chain) -> Tensor | None:
    """``x`` after the plain run; None where torch refuses the last step, or has no finite gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            right = chain.plain()
        except REFUSALS:
            return None
    if not is_finite(right) or not right.outputs[0].is_floating_point():
        return None
    return right.outputs[0]


def op(family: str, *more: str) -> Callable[[Op], Op]:
    """Make the decorated function one of the family's."""

    def add(function: Op) -> Op:
        for name in (family, *more):
            FAMILIES.setdefault(name, []).append(function)
        return function

    return add


def lines(family: str, *templates: str) -> None:
    """Operations of one line, in which stand: ``{d}`` a dim, ``{e}`` another, ``{ds}`` some dims; ``{n}`` 1-3, ``{j}``
    -3-5, ``{f}`` a float, ``{b}`` a bool; ``{y}`` an operand that broadcasts, ``{like}`` one of the same shape; and of
    dim ``{d}``: ``{i}`` a row, ``{s}`` a slice, ``{k}`` some rows, ``{p}`` distinct ones, ``{pre}`` the colons before
    it; ``{l}`` some rows of dim ``{e}``."""
    for template in templates:
        FAMILIES.setdefault(family, []).append(_line(template))


def _line(template: str) -> Op:
    def draw(d: Draw, x: Tensor) -> str:
        fields: dict[str, Any] = {"d": d.dim(x), "e": d.dim(x), "n": d.int(1, 3), "b": d.maybe()}
        size = x.shape[fields["d"]]
        fields |= {"f": d.of(0.5, -1.5, 0.25, 2.0), "i": d.int(-size, size - 1), "j": d.int(-3, 5)}
        fields |= {"pre": ":, " * (fields["d"] % x.ndim)}
        lazy = {"y": d.broadcastable, "like": lambda x: d.operand(x.shape), "ds": d.dims}
        fields |= {name: make(x) for name, make in lazy.items() if f"{{{name}}}" in template}
        fields |= {"k": d.rows(size)} if "{k}" in template else {}
        fields |= {"l": d.rows(x.shape[fields["e"]])} if "{l}" in template else {}
        fields |= {"p": d.rows(size, distinct=True)} if "{p}" in template else {}
        fields |= {"s": d.slice(size)} if "{s}" in template else {}
        return template.format(**fields)

    return draw
