"""Means and spreads of parts, merged to those of their union. Everything is local.

By Chan, Golub and LeVeque's pairwise update in its K-way form (Updating Formulae, 1979): no difference of large
squares, so as exact as the parts' own moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from distpatch.torch_utils.constants import constant, number


def merge_moments(counts: Sequence[int], mean: Tensor, m2: Tensor) -> tuple[int, Tensor, Tensor]:
    """Mean and centred second moment of the union of samples stacked along dim 0.

    ``mean`` and ``m2`` (sum of squared distances from the mean): (K, ...); ``counts``: K. Returns (count, mean (...),
    m2 (...)), which have derivatives.
    """
    total = sum(counts)
    if counts and min(counts) == max(counts):
        union = mean[0] + (mean - mean[0]).mean(0)  # around one of them: means that are equal stay so
        return total, union, m2.sum(0) + (mean - union).square().sum(0) * counts[0]
    weight = mean.new_full((len(counts), *[1] * (mean.ndim - 1)), counts[0] if counts else 0)
    start = 0
    for count, alike in groupby(counts):
        stop = start + len(list(alike))
        if count != counts[0]:
            weight[start:stop] = count  # filled on the device: nothing is copied to it
        start = stop
    middle = (
        mean[max(range(len(counts)), key=counts.__getitem__)] if counts else 0.0
    )  # around it, means that are equal stay so
    union = middle + ((mean - middle) * (weight / max(total, 1))).sum(0)
    spread_between = ((mean - union).square() * weight).sum(0)
    return total, union, m2.sum(0) + spread_between


def merge_deviations(counts: Sequence[int], parts: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean, and ``sqrt(variance + eps)``, of the union of parts, of which these are means and deviations, in fp64.

    ``parts``: (K, 2, ...); ``counts``: K. The same formula in two kernels: one product with a matrix that is made once
    for all calls that are alike, of whose result the squares are added. Without derivatives, which it has not where a
    deviation is 0.
    """
    if len(counts) == 1:
        mean, deviation = parts[0]
        return mean, torch.hypot(deviation, constant(number, math.sqrt(eps), like=deviation)) if eps else deviation
    shares = _shares(tuple(counts))
    matrix, rest = constant(_products, shares, eps, like=parts), constant(_rest, shares, eps, like=parts)
    columns = parts.reshape(2 * len(counts), -1)
    if torch.are_deterministic_algorithms_enabled():  # torch may then refuse a product of matrices on a GPU
        rows = (matrix.unsqueeze(-1) * columns).sum(1) + rest
    else:
        rows = torch.addmm(rest, matrix, columns)
    spread, shape = torch.linalg.vector_norm(rows[:-1], dim=0), parts.shape[2:]
    return rows[-1].view(shape), spread.view(shape)


@lru_cache(maxsize=4096)
def _shares(counts: tuple[int, ...]) -> tuple[int, ...]:
    """The same for all counts that are in proportion."""
    divisor = math.gcd(*counts) or 1
    return tuple(count // divisor for count in counts)


def _products(shares: Sequence[int], eps: float) -> list[list[float]]:
    """What the means and deviations of K parts, in turns, are multiplied by, for 2 K + 2 rows.

    With what is added (``_rest``) the squares of all but the last add up to the variance + eps; the last is the mean.
    """
    weights = [share / max(sum(shares), 1) for share in shares]
    between = [
        [math.sqrt(weight) * part for other, share in enumerate(weights) for part in ((other == place) - share, 0.0)]
        for place, weight in enumerate(weights)
    ]
    within = [
        [part for other in range(len(weights)) for part in (0.0, math.sqrt(weight) * (other == place))]
        for place, weight in enumerate(weights)
    ]
    mean = [part for weight in weights for part in (weight, 0.0)]
    return [*between, *within, [0.0] * len(mean), mean]


def _rest(shares: Sequence[int], eps: float) -> list[list[float]]:
    """What is added to these rows: the constant ``eps`` is a deviation too."""
    return [[0.0]] * (2 * len(shares)) + [[math.sqrt(eps)], [0.0]]
