"""The one driver of operations that read neighbouring rows: what is fetched, and how the rows are then computed.

A rule gives a stencil for each spatial dim and a ``Kernel``. Here is decided whether rows are computed later or now;
and if now, in one call on the rank's own rows whose seams are mended, or on rows put together with their halo, all
at once or in patches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distpatch.comm.moments_exchange import Strips
from distpatch.comm.row_exchange import begin_rows, fetch_rows
from distpatch.comm.rows_around import fetch_around
from distpatch.comm.transport import Finish
from distpatch.layout.rows import EMPTY, Bounds, Needs, RowLayout, Stencil
from distpatch.layout.stencil import WindowStencil
from distpatch.layout.transfers import RankPlan, plan_edges
from distpatch.lazy.deferred_ops import defer_window, unchanged
from distpatch.lazy.recipe import Recipe
from distpatch.lazy.row_patches import Kernel, Slab, compute_now, nothing_to_wait_for
from distpatch.rules.core.executor import deferrable
from distpatch.rules.core.operands import PLAIN, replicated_operand
from distpatch.rules.core.redistribution import along_rows
from distpatch.rules.core.window_plan import Given, WindowPlan, plan_rows, plan_windows
from distpatch.rules.core.wrapping import on_some_rows, wrap
from distpatch.tensor.halo_rows import halo_pieces
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.chunk_sizes import planned_for
from distpatch.torch_utils.memory_format import format_by_strides
from distpatch.torch_utils.op_names import op_name


class Weights(NamedTuple):
    """What a convolution has beside the image."""

    weight: Tensor
    bias: Tensor | None

    def match(self, x: PatchTensor) -> bool:
        """Whether nothing can be wrong with the call: then an error need not come out at once."""
        kind = x.dtype, x.device
        return all(t is None or (t.dtype, t.device) == kind for t in self)


def run_windows(
    func: Any,
    x: PatchTensor,
    stencils: Sequence[Stencil],
    kernel: Kernel,
    *,
    fill: float = 0.0,
    pads: bool = False,
) -> Any:
    """An operation with a stencil along each of the last dims; what the kernel returns, sharded.

    Where none of these is sharded, the kernel is called once, on whole images.
    """
    plan = plan_windows(op_name(func), given(x), tuple(stencils), pads=pads)
    return carry_out(plan, func, x, kernel, fill=fill)


def run_stencil(
    func: Any, x: PatchTensor, stencil: Stencil, kernel: Kernel, *, view: bool = False, growth: int = 1
) -> Any:
    """The same along the rows alone. An idle rank computes the first output row of a blank image, and keeps none.

    ``view``: the result is one, and never computed in parts; ``growth``: how many times longer a row becomes.
    """
    return carry_out(plan_rows(given(x), stencil, view=view, growth=growth), func, x, kernel)


def given(x: PatchTensor, weight: Tensor | None = None) -> Given:
    """What a plan is found by."""
    rows, region, compiling = x.local_or_recipe, x.region, torch.compiler.is_compiling()
    shape, of_weight = x.shape, torch.Size() if weight is None else weight.shape
    if compiling:  # plans are constants: no size is a symbol
        shape, of_weight = (torch.Size(map(operator.index, sizes)) for sizes in (shape, of_weight))
    kind, recorded = planned_for.kind or rows.device.type, compiling or torch.is_grad_enabled()
    how = region.options, rows.dtype, kind, recorded, region.inner is not None
    return Given(shape, of_weight, x.row_layout, region.comm.rank, *how)


def fixed(value: Any) -> Any:
    """A kernel's size, stride or the like in numbers, which a plan can be found by: a tensor may change."""
    if type(value) is tuple:
        return tuple(map(operator.index, value))
    if type(value) is int or isinstance(value, str):
        return value
    return tuple(map(operator.index, value)) if isinstance(value, (tuple, list)) else operator.index(value)


def carry_out(
    plan: WindowPlan, func: Any, x: PatchTensor, kernel: Kernel, *, fill: float = 0.0, weights: Weights | None = None
) -> Any:
    """What is made of the tensor by its plan; the kernel gets the weights, too, by their names."""
    if weights is not None:
        if plan.may_defer and weights.match(x) and deferrable([x], x, size_bytes=plan.size_bytes) is not None:
            return PatchTensor(_later(func, x, plan, kernel, weights), plan.rank.layout, x.region)
        kernel = partial(kernel, weight=weights.weight, bias=weights.bias)
    if plan.axis < 0:
        local = on_some_rows(lambda rows: kernel(rows, 0, 0, plan.out_rows), x.local, x.row_layout.dim)
        return _wrapped(local, x, x.row_layout)
    slab = halo(x, plan, func, fill)
    result = compute_now(kernel, slab, plan.cut)
    slab.landed()  # also where this rank needs none: then what it sends may be written to
    return _wrapped(result, x, plan.rank.layout)


def _later(func: Any, x: PatchTensor, plan: WindowPlan, kernel: Kernel, weights: Weights) -> Recipe:
    """A convolution whose halo is exchanged now, and whose rows are deferred."""
    # By then what was convolved may be gone or changed: these are its weights now.
    weight, bias = weights.weight.detach(), weights.bias if weights.bias is None else weights.bias.detach()
    check = unchanged(op_name(func), weight, bias)

    def convolve(rows: Tensor, start: int, lo: int, hi: int) -> Tensor:
        check()
        result: Tensor = kernel(rows, start, lo, hi, weight=weight, bias=bias)
        return result

    source = x.as_recipe
    # No views of the rank's own rows: somebody may write over these.
    edges, landed = fetch_edges(x, plan.rank.needs, func) if plan.rank.moves else ([], nothing_to_wait_for)
    slab = _slab(x, plan.rank, source, edges, landed)
    format = format_by_strides(weight.shape, weight.stride())  # of the result, if it is not the input's
    format = source.format if format is torch.contiguous_format else format
    place, patch_rows, (top, _) = plan.rank.rows[0], plan.cut.patch_rows, plan.rank.needs[x.region.comm.rank]
    how = patch_rows, plan.row_aligned, top != EMPTY
    return defer_window(op_name(func), convolve, slab, plan.stencil, place, plan.shape, format, *how)


def _wrapped(result: Any, x: PatchTensor, layout: RowLayout) -> Any:
    if not isinstance(result, Tensor):
        return tuple(_wrapped(t, x, layout) for t in result)
    return wrap(result, x, layout) if x.row_stride else PatchTensor(result, layout, x.region)


def halo(x: PatchTensor, window: WindowPlan, func: Any, fill: float = 0.0) -> Slab:
    """This rank's rows with the rows that it needs above and below them; beyond the image, ``fill``."""
    plan = window.rank
    brought = halo_pieces(x, plan.needs) if plan.moves and x.halo_rows is not None else None
    own, rows = x.local, x.row_layout
    if brought is not None or not plan.moves:
        return _slab(x, plan, own, brought or (), fill=fill)
    if torch.is_grad_enabled() and own.requires_grad:
        given = rows.dim, rows.bounds, plan.needs, x.region.comm.name, op_name(func), True
        own, strips, edges = fetch_around(own, window.cut.strips(plan.own), *given)
        return _slab(x, plan, own, edges, fill=fill)._replace(strips=tuple(strips))
    edges, landed = _exchanged(x, own, rows.bounds, plan.needs, func)
    return _slab(x, plan, own, edges, landed, fill)


def _exchanged(x: PatchTensor, rows: Tensor, bounds: Bounds, needs: Needs, func: Any) -> tuple[list[Tensor], Finish]:
    """The halo, and what is to be called before it is read."""
    given = rows, x.row_layout.dim, bounds, needs, x.region.comm.name, op_name(func), True
    if x.region.options.overlap and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return begin_rows(*given)
    return fetch_rows(*given), nothing_to_wait_for


def _slab(
    x: PatchTensor,
    plan: RankPlan,
    own: Any,
    edges: Sequence[Tensor] = (),
    landed: Finish = nothing_to_wait_for,
    fill: float = 0.0,
) -> Slab:
    dim, size = x.row_layout.dim, x.row_layout.size
    if not edges:
        return Slab(((plan.own[0], own),), 0, dim, size, fill)
    (top, _), (bottom, _) = plan.needs[x.region.comm.rank]
    return Slab(((top, edges[0]), (plan.own[0], own), (bottom, edges[1])), 1, dim, size, fill, landed)


def fetch_edges(x: PatchTensor, needs: Needs, func: Any) -> tuple[list[Tensor], Finish]:
    """The halo, as ``_exchanged`` gives it; of rows that are deferred, only those that others need are computed."""
    if x.halo_rows is not None and (brought := halo_pieces(x, needs)) is not None:
        return brought, nothing_to_wait_for
    strips = _copied_strips(x, needs)
    return _exchanged(x, strips.rows, strips.bounds, strips.needs, func)


def strips_of(x: PatchTensor, needs: Needs) -> Strips:
    """The rows that any rank needs of this one, among others where all exist."""
    if x.is_deferred:
        return _copied_strips(x, needs)
    return Strips(x.local, x.row_layout.dim, x.row_layout.bounds, needs)


def _copied_strips(x: PatchTensor, needs: Needs) -> Strips:
    plan, dim, recipe = plan_edges(x.row_layout.bounds, needs), x.row_layout.dim, x.as_recipe
    strips = [recipe.evaluate(lo, hi) for lo, hi in plan.strips[x.region.comm.rank]]
    return Strips(torch.cat(strips, dim) if strips else recipe.sample(), dim, plan.bounds, plan.needs)


def convolved(
    func: Any, x: PatchTensor, weight: Tensor, bias: Tensor | None
) -> tuple[PatchTensor, Tensor, Tensor | None]:
    """The operands of a convolution: the weights replicated, the image along its rows and in autocast's dtype.

    So halo rows are sent in that dtype.
    """
    if x.row_layout.dim == 1:
        x = along_rows(x, func)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype.is_floating_point and x.dtype != torch.float64:
        x = wrap(x.local.to(torch.get_autocast_dtype(kind)), x)
    return x, _replicated(weight, x), None if bias is None else _replicated(bias, x)


def _replicated(tensor: Tensor, x: PatchTensor) -> Tensor:
    recorded = tensor.requires_grad and torch.is_grad_enabled()
    return tensor if type(tensor) in PLAIN and not recorded else replicated_operand(tensor, x)


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
