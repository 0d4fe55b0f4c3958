"""Fourier transforms: local beside the rows; along them each rank has some channels whole for as long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpatch.layout.rows import RowLayout
from distpatch.rules.core.operands import normalize_dims
from distpatch.rules.core.redistribution import redistribute, turned, widest_beside
from distpatch.rules.core.registry import rule
from distpatch.rules.core.wrapping import beside_rows
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.op_names import op_name

_KINDS = "fft ifft rfft irfft hfft ihfft".split()


@rule(*(getattr(torch.fft, kind + many) for kind in _KINDS for many in ("", "2", "n")))
def fourier(func: Any, input: PatchTensor, size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """Over the sharded dim: two exchanges of all elements, each between all ranks."""
    name = "s" if op_name(func)[-1] in "2n" else "n"
    default = {"2": (-2, -1), "n": None}.get(op_name(func)[-1], -1)
    given = {name: size, "dim": default, **dict(zip(("dim", "norm"), args)), **kwargs}
    if given["dim"] is None and given[name] is not None:
        given["dim"] = tuple(range(-len(given[name]), 0))
    dims = normalize_dims(given["dim"], input.ndim)
    beside = [d for d in range(input.ndim) if d not in dims]
    if not beside:
        return NotImplemented
    if input.row_layout.dim in beside:
        return beside_rows(func, input, **given)
    widest = widest_beside(input, dims)
    if widest is None:
        return NotImplemented
    result = beside_rows(func, turned(input, widest, func), **given)
    row = input.row_layout.dim
    same = result.shape[row] == input.row_layout.size
    return redistribute(
        result, input.row_layout if same else RowLayout(row, input.region.bounds(result.shape[row])), func
    )
