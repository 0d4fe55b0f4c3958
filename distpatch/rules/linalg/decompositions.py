"""Decompositions and solvers: local where the sharded dim is one of the batch, so that every matrix is whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpatch.comm.collectives import join_gradients
from distpatch.rules.core.operands import local_operand
from distpatch.rules.core.registry import named, of_linalg, rule
from distpatch.rules.core.wrapping import wrap
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.tree import map_tensors

_OF_ONE_MATRIX = """
cholesky cholesky_ex cholesky_inverse cond det eig eigh eigvals eigvalsh geqrf inv inv_ex inverse ldl_factor
ldl_factor_ex logdet lu lu_factor lu_factor_ex matrix_exp matrix_power matrix_rank pinv pinverse qr slogdet svd svdvals
""".split()
_OF_TWO_MATRICES = "cholesky_solve lstsq solve solve_ex solve_triangular triangular_solve".split()


@rule(*named(*_OF_ONE_MATRIX), *of_linalg(*_OF_ONE_MATRIX, "polar"))
def of_one_matrix(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``x``: (..., M, N). Results have the batch dims of ``x`` in front."""
    if not isinstance(x, PatchTensor) or x.row_layout.dim >= x.ndim - 2 or _more_tensors(args, kwargs):
        return NotImplemented
    return map_tensors(lambda t: wrap(t, x), func(x.local, *args, **kwargs))


@rule(*named(*_OF_TWO_MATRICES), *of_linalg(*_OF_TWO_MATRICES))
def of_two_matrices(func: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    """``a`` and ``b``: (..., M, N), whose batch dims are broadcast; for ``solve`` also vectors, (..., M)."""
    if func in (torch.linalg.solve, torch.linalg.solve_ex) and _are_vectors(a, b) and kwargs.get("left", True):
        columns = func(a, b.unsqueeze(-1), *args, **kwargs)
        return (
            columns.squeeze(-1)
            if isinstance(columns, Tensor)
            else type(columns)((columns[0].squeeze(-1), *columns[1:]))
        )
    lead = max((t for t in (a, b) if _has_sharded_batch(t)), key=lambda t: (t.row_layout.size, t.ndim), default=None)
    if lead is None or lead.ndim < max(a.ndim, b.ndim) or _more_tensors(args, kwargs):
        return NotImplemented
    dim = lead.row_layout.dim - lead.ndim
    if any(t.ndim >= -dim and t.shape[dim] not in {1, lead.row_layout.size} for t in (a, b)):
        return NotImplemented
    operands = join_gradients([t.local if t is lead else local_operand(t, lead, dim, func) for t in (a, b)])
    return map_tensors(lambda t: wrap(t, lead), func(*operands, *args, **kwargs))


def _are_vectors(a: Tensor, b: Tensor) -> bool:
    """As torch tells a batch of vectors from one of matrices."""
    return b.ndim == 1 or (a.ndim - 1 == b.ndim and b.shape == a.shape[:-1])


def _has_sharded_batch(t: Tensor) -> bool:
    return isinstance(t, PatchTensor) and t.row_layout.dim < t.ndim - 2


def _more_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
