"""How many rows each rank gets, where some compute faster than others: integers, no communication."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate

from distpatch.layout.rows import Bounds, even_bounds

LEAST_UNITS = 8  # into which the smallest share is cut at the least, so that rounding costs a few per cent
Weights = tuple[float, ...]  # a positive number a rank: its rows in an hour, in any unit


def weights_of(given: object) -> object:
    """A sequence of numbers as a tuple of floats, which compares and prints alike on all ranks; all else as it is."""
    if given is None or isinstance(given, str) or not isinstance(given, Iterable):
        return given
    try:
        return tuple(float(weight) for weight in given)
    except (TypeError, ValueError):
        return given


def checked(given: object, world_size: int) -> Weights:
    """The weights, if they are one positive number a rank. Raises ``ValueError`` where they are not."""
    wanted = f'weights is "measured", or one positive number for each of the {world_size} rank(s)'
    if not isinstance(given, tuple) or not all(isinstance(weight, float) for weight in given):
        raise ValueError(f"{wanted}; got {given!r}")
    if len(given) != world_size:
        raise ValueError(f"{wanted}; got {len(given)}: {given}")
    for rank, weight in enumerate(given):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"{wanted}; got {weight} for rank {rank}")
    return given


def shared_bounds(rows: int, world_size: int, weights: Weights | None) -> Bounds:
    """Bounds in proportion to the weights; without any, or where all are alike, ``even_bounds``.

    Where there are many rows, bounds are multiples of a power of two: layers with strides keep them, and of two images
    of a call, one 8 times as tall, each rank has the same part.
    """
    if weights is None or min(weights) == max(weights):
        return even_bounds(rows, world_size)
    unit, least = 1, min(weights) / math.fsum(weights)
    while rows % (2 * unit) == 0 and rows * least >= LEAST_UNITS * 2 * unit:
        unit *= 2
    return tuple(unit * bound for bound in _weighted_bounds(rows // unit, weights))


@lru_cache(maxsize=4096)
def _weighted_bounds(rows: int, weights: Weights) -> Bounds:
    """Each rank's share, rounded so that the slowest rank takes as little time as it can.

    A rank whose share is half a row or more has one, as far as there are rows.
    """
    total = math.fsum(weights)
    shares = [rows * (weight / total) for weight in weights]
    heights = [max(math.floor(share), int(share >= 0.5)) for share in shares]
    ranks = range(len(weights))
    while sum(heights) > rows:  # of the rank that takes longest, but not its only row unless nobody has more
        least = 1 if max(heights) > 1 else 0
        heights[max((heights[r] / weights[r], r) for r in ranks if heights[r] > least)[1]] -= 1
    while sum(heights) < rows:  # to the rank that then takes least time
        heights[min(((heights[r] + 1) / weights[r], r) for r in ranks)[1]] += 1
    return tuple(accumulate(heights, initial=0))
