"""The one driver of operations that read neighbouring rows: what is fetched, and how the rows are then computed.

A rule gives a stencil for each spatial dim and a ``Kernel``. Here is decided whether rows are computed later or now;
and if now, in one call on the rank's own rows whose seams are mended, or on rows put together with their halo, all
at once or in patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distpatch.comm import collectives
from distpatch.comm.row_exchange import fetch_rows
from distpatch.errors import LayoutError
from distpatch.layout.rows import Needs, RowLayout, Stencil
from distpatch.layout.stencil import WindowStencil, ceil_div
from distpatch.layout.transfers import RankPlan, out_sizes, plan_edges, plan_rank
from distpatch.lazy.deferred_ops import defer_window, unchanged
from distpatch.lazy.recipe import Recipe
from distpatch.lazy.row_patches import Kernel, Slab, choose_patch_rows, compute_now, fewest_calls
from distpatch.rules.core.executor import deferrable
from distpatch.rules.core.operands import (
    along_rows,
    fetch,
    in_compute_dtype,
    on_some_rows,
    replicated_operand,
    wrap,
)
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.memory_format import memory_format
from distpatch.torch_utils.op_names import op_name


class Weights(NamedTuple):
    """What a convolution has beside the image: ``channels`` come out; ``fit``: the input has those that it reads."""

    weight: Tensor
    bias: Tensor | None
    channels: int
    fit: bool

    def match(self, x: PatchTensor) -> bool:
        """Whether nothing can be wrong with the call: then an error need not come out at once."""
        kind = x.dtype, x.device
        return self.fit and all(t is None or (t.dtype, t.device) == kind for t in (self.weight, self.bias))


def run_windows(
    func: Any,
    x: PatchTensor,
    stencils: Sequence[Stencil],
    kernel: Kernel,
    *,
    fill: float = 0.0,
    pads: bool = False,
    weights: Weights | None = None,
) -> Any:
    """An operation with a stencil along each of the last dims; what the kernel returns, sharded.

    Where none of these is sharded, the kernel is called once, on whole images.
    """
    spatial = len(stencils)
    sizes = out_sizes(tuple(stencils), tuple(x.shape[-spatial:]))
    if min(sizes) < 1:
        raise LayoutError(
            f"{op_name(func)}: an input of shape {tuple(x.shape)} is smaller than the kernel: "
            f"{list(stencils)} give an output of {list(sizes)}"
        )
    axis = x.row_layout.dim - x.ndim + spatial
    if axis >= 0:
        channels = x.shape[-spatial - 1] if weights is None else weights.channels
        shape = [*x.shape[: -spatial - 1], channels, *sizes]
        return run_stencil(func, x, stencils[axis], kernel, fill=fill, pads=pads, weights=weights, shape=shape)
    run = kernel if weights is None else partial(_weighted, kernel, weights)
    local = on_some_rows(lambda rows: run(rows, 0, 0, sizes[0]), x.local, x.row_layout.dim)
    return _wrapped(local, x, x.row_layout)


def run_stencil(
    func: Any,
    x: PatchTensor,
    stencil: Stencil,
    kernel: Kernel,
    *,
    fill: float = 0.0,
    pads: bool = False,
    view: bool = False,
    growth: int = 1,
    weights: Weights | None = None,
    shape: list[int] | None = None,
) -> Any:
    """The same along the rows alone. An idle rank computes the first output row of a blank image, and keeps none.

    ``view``: the result is one, and never computed in parts; ``growth``: how many times longer a row becomes;
    ``shape``: of the result.
    """
    options, dim = x.region.options, x.row_layout.dim
    plan = plan_rank(x.row_layout, stencil, x.region.comm.rank)
    lo, hi = plan.rows
    patch_rows = hi - lo
    if weights is not None and shape is not None:
        shape[dim] = hi - lo
        numel = math.prod(shape)
        patch_rows = choose_patch_rows(options, hi - lo, x.local_or_recipe, weights.weight, numel)
        may_defer = patch_rows < hi - lo and pads and options.sequential and weights.match(x)
        if may_defer and deferrable([x], x, size_bytes=numel * x.dtype.itemsize) is not None:
            return wrap(_later(func, x, stencil, kernel, weights, plan, shape, patch_rows), x, plan.layout)
        kernel = partial(_weighted, kernel, weights)
    elif not view:
        rows = x.local.shape[dim]
        largest = x.local.numel() * max(growth * (hi - lo), rows) // max(rows, 1)
        patch_rows = max(ceil_div(hi - lo, fewest_calls(largest)), 1)
    together = pads and weights is not None and not options.sequential
    slab = halo(x, plan.needs, func, fill)
    result = compute_now(kernel, slab, stencil, plan, patch_rows, pads=pads, view=view, together=together)
    return _wrapped(result, x, plan.layout)


def _weighted(kernel: Kernel, weights: Weights, *rows: Any) -> Any:
    return kernel(*rows, weights.weight, weights.bias)


def _later(
    func: Any,
    x: PatchTensor,
    stencil: Any,
    kernel: Kernel,
    weights: Weights,
    plan: RankPlan,
    shape: Sequence[int],
    patch_rows: int,
) -> Recipe:
    """A convolution whose halo is exchanged now, and whose rows are deferred."""
    # By then what was convolved may be gone or changed: these are its weights now.
    weight, bias = weights.weight.detach(), weights.bias if weights.bias is None else weights.bias.detach()
    check = unchanged(op_name(func), weight, bias)

    def convolve(rows: Tensor, start: int, lo: int, hi: int) -> Tensor:
        check()
        result: Tensor = kernel(rows, start, lo, hi, weight, bias)
        return result

    slab = halo(x, plan.needs, func, defer=True)
    format = memory_format(weight)  # of the result, if it is not the input's
    format = x.as_recipe.format if format is torch.contiguous_format else format
    return defer_window(op_name(func), convolve, slab, stencil, plan.rows, shape, format, patch_rows)


def _wrapped(result: Any, x: PatchTensor, layout: RowLayout) -> Any:
    return wrap(result, x, layout) if isinstance(result, Tensor) else tuple(wrap(t, x, layout) for t in result)


def halo(x: PatchTensor, needs: Needs, func: Any, fill: float = 0.0, defer: bool = False) -> Slab:
    """This rank's rows with the rows that it needs above and below them; beyond the image, ``fill``.

    ``defer``: without computing the rank's own, if they are deferred (inference only).
    """
    dim, rank = x.row_layout.dim, x.region.comm.rank
    own: Any
    if defer:
        above, below = fetch_edges(x, needs, func)  # no views of the rank's own: somebody may write over these
        own = x.as_recipe
    else:
        above, below = fetch(x, needs, func, channels_last=True)
        own = x.local
        if own.requires_grad:
            own = collectives.anchor_in_graph(own, above, below)
    (top, _), (bottom, _) = needs[rank]
    pieces = ((top, above), (x.row_layout.bounds[rank], own), (bottom, below))
    return Slab(pieces, 1, dim, x.shape[dim], fill)


def fetch_edges(x: PatchTensor, needs: Needs, func: Any) -> list[Tensor]:
    """As ``fetch`` of rows that are all other ranks' own; of rows that are deferred, only those are computed."""
    plan, dim, recipe = plan_edges(x.row_layout.bounds, needs), x.row_layout.dim, x.as_recipe
    strips = [recipe.evaluate(lo, hi) for lo, hi in plan.strips[x.region.comm.rank]]
    edges = torch.cat(strips, dim) if strips else recipe.sample()
    return fetch_rows(edges, dim, plan.bounds, plan.needs, x.region.comm.name, op_name(func), True)


def convolved(
    func: Any, x: PatchTensor, weight: Tensor, bias: Tensor | None
) -> tuple[PatchTensor, Tensor, Tensor | None]:
    """The operands of a convolution: the image along its rows and in autocast's dtype, the weights replicated."""
    x = in_compute_dtype(along_rows(x, func))
    return x, replicated_operand(weight, x), None if bias is None else replicated_operand(bias, x)


def batched(ndim: int | None = None) -> Callable[[Any], Any]:
    """Let a rule see batches alone; ``ndim``: their dims, by default those that the function's name says, and two."""

    def decorate(handler: Any) -> Any:
        @wraps(handler)
        def of_a_batch(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
            if input.ndim != (ndim or spatial_dims(func) + 2) - 1:
                return handler(func, input, *args, **kwargs)
            return of_a_batch(func, input.unsqueeze(0), *args, **kwargs).squeeze(0)

        return of_a_batch

    return decorate


@lru_cache(maxsize=256)
def spatial_dims(func: Any) -> int:
    """2 of ``max_pool2d``."""
    return next(int(letter) for letter in op_name(func) if letter.isdigit())


def paddings(windows: Sequence[WindowStencil], axis: int, start: int, lo: int) -> list[int]:
    """What a kernel pads: other dims as asked for, rows by what is not given above output row ``lo``."""
    pads = [window.before for window in windows]
    row = windows[max(axis, 0)]
    pads[max(axis, 0)] = start - (lo * row.stride - row.before)
    return pads
