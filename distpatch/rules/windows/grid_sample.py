"""Sampling an image at the points of a grid, which may lie anywhere: output rows follow the grid's rows."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from distpatch.layout.rows import RowLayout
from distpatch.rules.core.operands import replicated_operand
from distpatch.rules.core.redistribution import gather_partial, redistribute
from distpatch.rules.core.registry import rule
from distpatch.rules.core.wrapping import on_some_rows, wrap
from distpatch.tensor.patch_tensor import PatchTensor, shard_in


def _of_points(input: Tensor, grid: Tensor, *_: Any, **__: Any) -> bool:
    """Of a grid: each point is a sample of its own."""
    return isinstance(grid, PatchTensor) and grid.row_layout.dim < grid.ndim - 1


@rule(F.grid_sample, torch.grid_sampler, torch.grid_sampler_2d, torch.grid_sampler_3d, any_order=_of_points)
def grid_sample(func: Any, input: Tensor, grid: Tensor, *args: Any, **kwargs: Any) -> PatchTensor:
    """``input``: (N, C, H, W), ``grid``: (N, H', W', 2), or both with a depth. All of a sharded input is
    fetched, unless its images or channels are what is sharded."""
    if isinstance(input, PatchTensor) and input.row_layout.dim == 1 and not isinstance(grid, PatchTensor):
        points = replicated_operand(grid, input)
        return wrap(on_some_rows(lambda part: func(part, points, *args, **kwargs), input.local, 1), input)
    grid = _sharded(grid, cast(PatchTensor, input))
    if grid.row_layout.dim == 0:
        images = _like(input, grid, func)
        return wrap(func(images, grid.local, *args, **kwargs), grid)
    image = gather_partial(input, func) if isinstance(input, PatchTensor) else replicated_operand(input, grid)
    dim = grid.row_layout.dim
    sampled = on_some_rows(lambda points: func(image, points, *args, **kwargs), grid.local, dim, out_dim=dim + 1)
    return wrap(sampled, grid, grid.row_layout.with_dim(dim + 1))


def _sharded(grid: Tensor, input: PatchTensor) -> PatchTensor:
    """The grid, sharded along its images or points: a plain one as the input is, where it is as large."""
    if isinstance(grid, PatchTensor) and grid.row_layout.dim < grid.ndim - 1:
        return grid
    if isinstance(grid, PatchTensor):  # by coordinates
        layout = RowLayout(1, grid.region.bounds(grid.shape[1]))
        return redistribute(grid, layout, F.grid_sample)
    dim = max(input.row_layout.dim - 1, 0)
    same = grid.shape[dim] == input.row_layout.size
    bounds = input.row_layout.bounds if same else input.region.bounds(grid.shape[dim])
    return shard_in(input.region, grid, RowLayout(dim, bounds))


def _like(tensor: Tensor, lead: PatchTensor, func: Any) -> Tensor:
    if isinstance(tensor, PatchTensor):
        return redistribute(tensor, lead.row_layout, func).local
    return shard_in(lead.region, tensor, lead.row_layout).local
