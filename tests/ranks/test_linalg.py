"""Decompositions and solvers of many matrices, one for each place of an image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.oracle import H, case, random_tensor

M = (H, 2, 3, 3)  # a matrix for each place of an image
LINALG = torch.linalg


def regular(x: Tensor) -> Tensor:
    """Symmetric, and far from singular."""
    return x @ x.mT + 2 * torch.eye(x.shape[-1], dtype=x.dtype)


CASES = {
    "inv": case(lambda x: LINALG.inv(regular(x)), M, dim=0),
    "inverse, of a method": case(lambda x: regular(x).inverse(), (2, H, 3, 3), dim=1),
    "det": case(lambda x: LINALG.det(regular(x)), M, dim=0),
    "slogdet": case(lambda x: LINALG.slogdet(regular(x))[1], M, dim=0),
    "logdet": case(lambda x: torch.logdet(regular(x)), M, dim=0),
    "cholesky": case(lambda x: LINALG.cholesky(regular(x)), M, dim=0),
    "eigh": case(lambda x: LINALG.eigh(regular(x)).eigenvalues, M, dim=0),
    "svdvals": case(lambda x: LINALG.svdvals(x), (H, 2, 3, 4), dim=0),
    "svd": case(lambda x: torch.svd(x).S, (H, 2, 3, 4), dim=0),
    "qr": case(lambda x: LINALG.qr(regular(x)).R, M, dim=0),
    "pinv": case(lambda x: LINALG.pinv(regular(x)), M, dim=0),
    "matrix_exp": case(lambda x: LINALG.matrix_exp(x * 0.1), M, dim=0),
    "matrix_power": case(lambda x: LINALG.matrix_power(x, 3), M, dim=0),
    "solve": case(lambda x, b: LINALG.solve(regular(x), b), M, (H, 2, 3, 2), dim=0, sharded=2),
    "solve, plain right": case(lambda x, b: LINALG.solve(regular(x), b), M, (3, 2), dim=0),
    "solve, plain left": case(lambda b, x: LINALG.solve(regular(x), b), (H, 2, 3, 2), (2, 3, 3), dim=0),
    "solve, vectors": case(lambda x, b: LINALG.solve(regular(x), b), M, (H, 2, 3), dim=0, sharded=2),
    "solve_triangular": case(
        lambda x, b: LINALG.solve_triangular(LINALG.cholesky(regular(x)), b, upper=False), M, (3, 2), dim=0
    ),
    "cholesky_solve": case(
        lambda b, x: torch.cholesky_solve(b, LINALG.cholesky(regular(x))), (H, 2, 3, 2), M, dim=0, sharded=2
    ),
    "lstsq": case(lambda x, b: LINALG.lstsq(x, b).solution, (H, 2, 4, 3), (H, 2, 4, 2), dim=0, sharded=2),
    "whole matrices are gathered": case(
        lambda x: LINALG.inv(regular(x)), lambda rows: random_tensor((rows, rows)), fallback="linalg_inv"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_linalg(name: str) -> None:
    run: Callable[[], None] = CASES[name]
    run()
