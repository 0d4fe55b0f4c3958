"""Adaptive pooling, to any size: each output row covers one of as many equal parts of the rows.

Where the output is small, every rank pools its share of each part and the results are merged: all that
moves is as large as the output. Else the rows of a part, which are few, go to the owner of its output row.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.comm.collectives import stack_ranks
from distpatch.layout.stencil import AreaStencil
from distpatch.layout.transfers import plan_stencil
from distpatch.lazy.row_patches import with_dummy_row
from distpatch.rules.core.halo import run_stencil, spatial_dims
from distpatch.rules.core.operands import per_dim, precise, sum_ranks
from distpatch.rules.core.registry import named, rule
from distpatch.rules.core.wrapping import beside_rows, on_some_rows, wrap
from distpatch.rules.windows.filters import averaged
from distpatch.rules.windows.pooling import global_indices
from distpatch.tensor.patch_tensor import PatchTensor, shard_in
from distpatch.torch_utils.op_names import op_name
from distpatch.torch_utils.tree import map_tensors

Sizes = int | Sequence[int | None]


@rule(*named("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), asks_if_empty=True)
def adaptive_avg_pool(func: Any, input: PatchTensor, output_size: Sizes) -> Any:
    sizes, axis, parts = _parts(func, input, output_size)
    dim, dtype = input.row_layout.dim, input.dtype
    if axis < 0:
        return beside_rows(func, input, sizes)

    def pool(rows: Tensor, rows_out: int) -> Tensor:
        """Of one pixel torch takes the mean, which has other derivatives: never of what one rank alone may have."""
        if math.prod(sizes) == sizes[axis]:
            others = [d + (d > dim) for d in range(rows.ndim - len(sizes), rows.ndim) if d != dim]
            return rows.unflatten(dim, (rows_out, -1)).mean([*others, dim + 1], True).squeeze(dim + 1)
        return func(rows, [rows_out if d == axis else n for d, n in enumerate(sizes)])

    if _small(parts):
        sums = [own.sum(dim, True, dtype=precise(dtype)) for own, _ in _own_parts(input, parts)]
        total = sum_ranks(pool(torch.cat(sums, dim), parts.rows_out), input, func)
        row = torch.arange(parts.rows_out, device=total.device)
        counts = -(-(row + 1) * parts.rows_in // parts.rows_out) - row * parts.rows_in // parts.rows_out
        return _merged(total.div(counts.view([-1] + [1] * (input.ndim - 1 - dim))).to(dtype), input, parts)
    if parts.rows_in % parts.rows_out == 0:
        return run_stencil(func, input, parts, lambda rows, start, lo, hi: pool(rows, hi - lo))
    columns = on_some_rows(lambda rows: pool(rows, rows.shape[dim]), input.local.to(precise(dtype)), dim)
    x = averaged(wrap(columns, input), parts.rows_out, func)
    return wrap(x.local.to(dtype), x)


@rule(
    *named(*(f"adaptive_max_pool{n}d{suffix}" for n in (1, 2, 3) for suffix in ("", "_with_indices"))),
    asks_if_empty=True,
)
def adaptive_max_pool(func: Any, input: PatchTensor, output_size: Sizes, return_indices: bool = False) -> Any:
    sizes, axis, parts = _parts(func, input, output_size)
    spatial, dim = len(sizes), input.row_layout.dim
    return_indices |= op_name(func).endswith("indices") or func == torch.adaptive_max_pool1d
    plain = getattr(F, f"adaptive_max_pool{spatial}d")

    def pool(rows: Tensor, start: int, rows_out: int) -> tuple[Tensor, Tensor]:
        size = [rows_out if d == axis else n for d, n in enumerate(sizes)]
        values, indices = plain(rows, size, return_indices=True)
        return values, global_indices(indices, rows, dim, start, input) if axis >= 0 else indices

    def pool_parts(rows: Tensor, start: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        if parts.rows_in % parts.rows_out == 0:
            return pool(rows, start, hi - lo)
        ends = [parts.need(row, row + 1) for row in range(lo, hi)]
        pooled = [pool(rows.narrow(dim, a - start, b - a), a, 1) for a, b in ends]
        return torch.cat([v for v, _ in pooled], dim), torch.cat([i for _, i in pooled], dim)

    if axis < 0:
        local = on_some_rows(lambda rows: pool(rows, 0, 0), input.local, dim)
        result = map_tensors(lambda t: wrap(t, input), local)
    elif _small(parts):
        result = _merge_maxima(func, input, parts, pool, return_indices, in_order=axis == 0)
    else:
        result = run_stencil(func, input, parts, pool_parts)
    return result if return_indices else result[0]


def _parts(func: Any, x: PatchTensor, output_size: Sizes) -> tuple[list[int], int, AreaStencil]:
    """Output sizes, which of the spatial dims is sharded (below 0: none), and the parts of its rows."""
    spatial = spatial_dims(func)
    sizes = [m or n for m, n in zip(per_dim(output_size, spatial), x.shape[-spatial:], strict=True)]
    axis = x.row_layout.dim - x.ndim + spatial
    return sizes, axis, AreaStencil(x.row_layout.size, sizes[max(axis, 0)])


def _small(parts: AreaStencil) -> bool:
    """Fewer rows come out than go into one of them."""
    return parts.rows_out**2 <= parts.rows_in


def _own_parts(x: PatchTensor, parts: AreaStencil) -> list[tuple[Tensor, int]]:
    """What this rank has of each part, and the first row of that."""
    dim, (own_start, own_stop) = x.row_layout.dim, x.row_layout.interval(x.region.comm.rank)
    own = []
    for row in range(parts.rows_out):
        start, stop = (min(max(n, own_start), own_stop) for n in parts.need(row, row + 1))
        own.append((x.local.narrow(dim, start - own_start, stop - start), start))
    return own


def _merged(result: Tensor, x: PatchTensor, parts: AreaStencil) -> Tensor:
    """A single row is everybody's, as any reduction over the rows; several are sharded."""
    if parts.rows_out == 1:
        return result
    return shard_in(x.region, result, x.row_layout.with_bounds(plan_stencil(x.row_layout.bounds, parts).out))


def _merge_maxima(
    func: Any,
    x: PatchTensor,
    parts: AreaStencil,
    pool: Callable[[Tensor, int, int], tuple[Tensor, Tensor]],
    return_indices: bool,
    *,
    in_order: bool,
) -> tuple[Tensor, ...]:
    """The maxima of the ranks' shares of each part; of equal ones the first, as on one device.

    ``in_order``: that of the first rank is; else, as along the width, only the indices tell.
    """
    dim, name, op = x.row_layout.dim, x.region.comm.name, op_name(func)
    own = []
    for rows, start in _own_parts(x, parts):
        own.append(pool(with_dummy_row(rows, dim, -math.inf), start, 1))
    kinds = zip(*own, strict=True) if return_indices or not in_order else [[values for values, _ in own]]
    ranks = [stack_ranks(torch.cat(list(kind), dim), name, op) for kind in kinds]
    merged: list[list[Tensor]] = [[] for _ in ranks]
    for row in range(parts.rows_out):
        first = bisect_right(x.row_layout.bounds, parts.need(row, row + 1)[0]) - 1  # who has the part's first row
        shares = [t.narrow(0, first, t.shape[0] - first).narrow(dim + 1, row, 1) for t in ranks]
        values, winner = shares[0].max(0, keepdim=True)
        if not in_order:
            tied = (shares[0] == values) | shares[0].isnan()
            winner = shares[1].where(tied, x.numel()).min(0, keepdim=True).indices
        for kind, share in zip(merged, shares, strict=True):
            kind.append(share.gather(0, winner)[0])
    found = merged if return_indices else merged[:1]
    return tuple(_merged(torch.cat(kind, dim), x, parts) for kind in found)
