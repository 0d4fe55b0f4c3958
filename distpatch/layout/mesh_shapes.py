"""Which dims of an image to share out, over how many ranks each: by what is sent and who gets how much. Integers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distpatch.layout.stencil import ceil_div

AUTO = "auto"


@dataclass(frozen=True)
class MeshChoice:
    """``mesh``: how many ranks each axis has, for ``init_device_mesh``; ``dims``: what is sharded over each.

    ``edge``: pixels beside a rank's own part that are other ranks', for each row that a convolution reads beyond it;
    ``imbalance``: the largest part over the mean.
    """

    mesh: tuple[int, ...]
    dims: tuple[int, ...]
    part: tuple[int, ...]
    edge: int
    imbalance: float
    others: tuple[MeshChoice, ...] = ()

    @property
    def dim(self) -> int | tuple[int, ...]:
        """As ``convert_model`` takes it."""
        return self.dims[0] if len(self.dims) == 1 else self.dims

    @property
    def why(self) -> str:
        """The choice beside the other ones, in words."""
        lines = [f"{self._words()}: chosen"]
        lines += [f"{other._words()}" for other in self.others]
        return "\n".join(lines)

    def _words(self) -> str:
        ranks, part = " x ".join(map(str, self.mesh)), " x ".join(map(str, self.part))
        return (
            f"{ranks} ranks along dims {self.dims}: at the most {part} a rank ({self.imbalance:.2f} times the mean), "
            f"{self.edge} pixels at its seams"
        )


def choose_mesh(shape: Sequence[int], ranks: int, dims: Sequence[int] = (-2, -1)) -> MeshChoice:
    """How to share out an image (B, C, ..., H, W) of this shape among so many ranks.

    Among the meshes whose largest part is at most a twentieth above that of the most even one, that which sends least
    at the seams of the rank with most; of equal ones that of fewer axes, whose rounds are fewer, and of rows before
    columns. Choose by the smallest image in the model (the latent one): its parts are uneven first. Raises
    ``ValueError`` where no mesh gives each rank a pixel.
    """
    found = [_choice(shape, mesh, dims) for mesh in _meshes(ranks, [shape[d] for d in dims])]
    if not found:
        raise ValueError(f"choose_mesh: {ranks} ranks cannot each have a part of dims {tuple(dims)} of {tuple(shape)}")
    even = min(choice.imbalance for choice in found) * 1.05
    best = min(found, key=lambda c: (c.imbalance > even, c.edge, len(c.mesh), c.imbalance, c.dims))
    rest = tuple(sorted((c for c in found if c is not best), key=lambda c: (c.imbalance > even, c.edge)))
    return MeshChoice(best.mesh, best.dims, best.part, best.edge, best.imbalance, rest)


def _meshes(ranks: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to write the number as a product, no factor larger than its dim."""
    if len(sizes) == 1:
        if ranks <= sizes[0]:
            yield (ranks,)
        return
    for first in range(1, min(ranks, sizes[0]) + 1):
        if ranks % first == 0:
            yield from ((first, *rest) for rest in _meshes(ranks // first, sizes[1:]))


def _choice(shape: Sequence[int], mesh: Sequence[int], dims: Sequence[int]) -> MeshChoice:
    parts = [ceil_div(shape[d], n) for d, n in zip(dims, mesh, strict=True)]
    whole = math.prod(parts)
    seams = [(2 if n > 2 else 1) * whole // part for part, n in zip(parts, mesh) if n > 1]
    mean = math.prod(shape[d] for d in dims) / math.prod(mesh)
    used = [(n, d, part) for n, d, part in zip(mesh, dims, parts) if n > 1] or [(mesh[0], dims[0], parts[0])]
    return MeshChoice(
        tuple(n for n, _, _ in used), tuple(d for _, d, _ in used), tuple(parts), sum(seams), whole / mean
    )
