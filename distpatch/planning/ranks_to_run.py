"""Which ranks a plan runs: of those that do the same, one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

FEW_RANKS = 4  # all of which are run


def places_of(mesh: Sequence[int]) -> list[tuple[int, ...]]:
    """Where each rank stands on each axis of a mesh, in the order of the ranks."""
    return list(itertools.product(*map(range, mesh)))


def ranks_to_run(heights: Sequence[Sequence[int]], ranks: Sequence[int] | None) -> dict[int, int]:
    """Ranks to run, each with how many it stands for: those of one height are alike unless at an edge, on each axis."""
    places = places_of([len(of_axis) for of_axis in heights])
    size = len(places)
    kinds = [
        tuple((at == 0, at == len(of_axis) - 1, of_axis[at]) for of_axis, at in zip(heights, place, strict=True))
        for place in places
    ]
    if ranks is None and size <= FEW_RANKS:
        ranks = range(size)
    elif ranks is None:
        ranks = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    chosen = sorted({rank if rank >= 0 else rank + size for rank in ranks})
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < size:
        raise ValueError(f"ranks are numbers from 0 to {size - 1}, at least one; got {list(ranks)}")
    known = {kinds[rank]: rank for rank in chosen}
    return dict(
        Counter(
            rank if rank in chosen else known.get(kinds[rank], min(chosen, key=lambda other: abs(other - rank)))
            for rank in range(size)
        )
    )
