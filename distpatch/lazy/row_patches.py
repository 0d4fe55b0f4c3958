"""Convolve one rank's rows: whole, with the seams mended, or a patch of rows at a time.

No padded copy of the rows is ever made: patches read the rank's own rows and the halo pieces, and write
into one output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from distpatch.layout.stencil import Interval, WindowStencil, ceil_div
from distpatch.lazy.recipe import Part, Recipe, Walk
from distpatch.profiling.op_costs import representative_chunks
from distpatch.torch_utils.chunk_sizes import kind_of, sizes_of
from distpatch.torch_utils.memory_format import memory_format

PATCH_PER_WEIGHT = 8  # bytes of a patch for each of the weights, which a CPU packs anew at every call
INDEX_LIMIT = 2**31  # elements of an input or output that kernels with 32-bit indices can address

Conv = Callable[[Tensor, int], Tensor]  # (rows, zero rows of padding above and below) -> output rows


@dataclass(frozen=True)
class Slab:
    """The rows of an image of ``size`` rows that one rank can read; beyond the image they are ``fill``.

    ``pieces``: (first global row, tensor) in ascending order; ``local`` of them is the rank's own, which may be
    a ``Recipe``: then ``rows`` is told how to ``take`` some.
    """

    pieces: tuple[tuple[int, Any], ...]
    local: int
    dim: int
    size: int
    fill: float = 0.0

    @property
    def own(self) -> tuple[int, int, Any]:
        first, tensor = self.pieces[self.local]
        return first, first + tensor.shape[self.dim], tensor

    def rows(self, lo: int, hi: int, take: Callable[[int, int], Tensor] | None = None) -> Tensor:
        """Rows [lo, hi): a view where the rank's own suffice, else a copy of just these rows."""
        start, stop, own = self.own
        if take is None:
            take = partial(_narrow, own, self.dim)
        if start <= lo and hi <= stop:
            return take(lo - start, hi - start)
        parts = [self._padding(min(hi, 0) - lo)] if lo < 0 else []
        for index, (first, piece) in enumerate(self.pieces):
            a, b = max(lo - first, 0), min(hi - first, piece.shape[self.dim])
            if a < b:
                parts.append(take(a, b) if index == self.local else piece.narrow(self.dim, a, b - a))
        if hi > self.size:
            parts.append(self._padding(hi - max(lo, self.size)))
        parts = [part for part in parts if part.shape[self.dim] > 0]
        assert sum(part.shape[self.dim] for part in parts) == hi - lo, f"rows {lo}:{hi} were not all fetched"
        if isinstance(own, Recipe) or max(lo, 0) < min(hi, self.size):
            return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)
        # Rows of padding alone would leave the autograd graph, and the halo's backward is collective.
        padding = torch.cat([own.narrow(self.dim, 0, 0), *parts], self.dim)  # whose format an empty part undoes
        return padding.contiguous(memory_format=memory_format(own))

    def blank(self, rows: int) -> Tensor:
        """Rows of padding alone: what an idle rank computes on, to keep its place in the autograd graph."""
        return self.rows(self.size, self.size + rows)

    def _padding(self, rows: int) -> Tensor:
        own = self.own[2]
        shape = [max(rows, 0) if d == self.dim else n for d, n in enumerate(own.shape)]
        return torch.full(shape, self.fill, dtype=own.dtype, device=own.device).contiguous(
            memory_format=own.format if isinstance(own, Recipe) else memory_format(own)
        )


def _narrow(rows: Tensor, dim: int, lo: int, hi: int) -> Tensor:
    return rows.narrow(dim, lo, hi - lo)


def deferred_conv(
    op: str,
    conv: Conv,
    slab: Slab,
    stencil: WindowStencil,
    out: Interval,
    shape: Sequence[int],
    format: torch.memory_format,
    patch_rows: int,
) -> Recipe:
    """Output rows ``out`` of a convolution, to be computed when they are asked for; theirs are shape and format."""
    (start, stop, source), dim = slab.own, slab.dim
    assert isinstance(source, Recipe)
    if kind_of(source.device) == "cpu":
        _keep_freed_patches()
    key = object()

    def compute(walk: Walk, lo: int, hi: int) -> Part:
        def read(a: int, b: int) -> Tensor:
            return slab.rows(a, b, lambda i, j: walk.rows(source, i, j)[0])

        a, b = stencil.need(out[0] + lo, out[0] + hi)
        if source.value is not None and not walk.overwrites:
            return conv(read(a, b), 0), True
        follow = stencil.need(out[0] + hi, out[0] + hi + 1)[0]
        return conv(walk.window(key, a, b, follow, dim, read), 0), True

    # What a row reads above itself is carried, if it was read: rows that end above their place are not.
    row_aligned = stencil.stride == 1 and out == (start, stop) and stencil.before < stencil.span
    return Recipe(
        source,
        dim,
        [source],
        compute,
        shape,
        op=op,
        format=format,
        row_aligned=row_aligned,
        expensive=True,
        patch_rows=patch_rows,
    )


@cache
def _keep_freed_patches() -> None:
    """Let malloc keep what a patch has freed for the next one: to be given fresh pages takes longer than to use them.

    glibc gives free memory back beyond twice the largest block that was freed so far, of up to 32 MiB. This one is
    never touched, so that it costs no memory.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def convolve(
    conv: Conv, slab: Slab, stencil: WindowStencil, out: Interval, patch_rows: int, sequential: bool
) -> Tensor:
    """Output rows ``out`` of a convolution (or any sliding window), ``patch_rows`` at a time."""
    lo, hi = out
    if lo == hi:
        return conv(slab.blank(stencil.span), 0).narrow(slab.dim, 0, 0)
    if patch_rows >= hi - lo:
        return _whole(conv, slab, stencil, lo, hi)
    if not sequential:
        return _batched(conv, slab, stencil, lo, hi, patch_rows)
    return in_patches(lambda a, b: conv(slab.rows(*stencil.need(a, b)), 0), out, patch_rows, slab.dim)


def in_patches(rows_at: Callable[[int, int], Tensor], out: Interval, patch_rows: int, dim: int) -> Tensor:
    """Output rows ``out``, computed by ``rows_at(start, stop)`` for ``patch_rows`` at a time."""
    lo, hi = out
    if patch_rows >= hi - lo:
        return rows_at(lo, hi)
    starts = range(lo, hi, patch_rows)
    if torch.is_grad_enabled():
        return torch.cat([rows_at(a, min(a + patch_rows, hi)) for a in starts], dim)
    return _collect(((a, rows_at(a, min(a + patch_rows, hi))) for a in representative_chunks(starts)), dim, lo, hi)


def _whole(conv: Conv, slab: Slab, stencil: WindowStencil, lo: int, hi: int) -> Tensor:
    """One call on the rank's own rows as if they were the image; the rows at its seams are redone."""
    start, stop, own = slab.own
    pad, step, dim = stencil.before, stencil.stride, slab.dim
    fits = pad == stencil.after and lo * step == start < stop and stop - start + 2 * pad >= stencil.span
    fits = fits and stop - start >= stencil.dilation  # no window has only padding: the index of a maximum would be none
    if not fits or stencil.out_rows(stop - start) != hi - lo:
        return _copied(conv, slab, stencil, lo, hi)
    top = min(ceil_div(start + pad, step), hi) if start > 0 else lo
    bottom = max((stop + pad - stencil.span) // step + 1, top) if stop < slab.size else hi
    if bottom - top < (hi - lo) // 2:
        return _copied(conv, slab, stencil, lo, hi)
    result = conv(own, pad)
    for a, b in ((lo, top), (bottom, hi)):
        if a < b:
            result.narrow(dim, a - lo, b - a).copy_(conv(slab.rows(*stencil.need(a, b)), 0))
    return result


def _copied(conv: Conv, slab: Slab, stencil: WindowStencil, lo: int, hi: int) -> Tensor:
    """Own rows and halo put together, which is a copy: of a part at a time, where there are many."""
    own = slab.own[2]
    sizes = sizes_of(own.device)
    parts = 1 if _is_recorded() else ceil_div(own.numel() * own.element_size(), sizes.part_bytes)
    patch_rows = ceil_div(hi - lo, min(max(parts, 1), sizes.most_parts))
    return in_patches(lambda a, b: conv(slab.rows(*stencil.need(a, b)), 0), (lo, hi), patch_rows, slab.dim)


def _batched(conv: Conv, slab: Slab, stencil: WindowStencil, lo: int, hi: int, patch_rows: int) -> Tensor:
    """Patches folded into the batch, one call; the last patch overlaps its neighbour to be as tall."""
    starts = [min(a, hi - patch_rows) for a in range(lo, hi, patch_rows)]
    patches = [slab.rows(*stencil.need(a, a + patch_rows)) for a in starts]
    result = conv(torch.cat(patches, 0), 0)
    *full, last = result.chunk(len(starts))  # views with a batch's own strides, which tell the memory format
    fresh = hi - lo - patch_rows * len(full)
    last = last.narrow(slab.dim, patch_rows - fresh, fresh)
    return torch.cat([*full, last], slab.dim)


def _collect(results: Iterable[tuple[int, Tensor]], dim: int, lo: int, hi: int) -> Tensor:
    """The patches' results, each with its first row, in one preallocated tensor of their memory format."""
    whole: Tensor | None = None
    for start, rows in results:
        if whole is None:
            shape = [hi - lo if d == dim else n for d, n in enumerate(rows.shape)]
            whole = torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=memory_format(rows))
        whole.narrow(dim, start - lo, rows.shape[dim]).copy_(rows)
        del rows
    assert whole is not None
    return whole


def _is_recorded() -> bool:
    """Whether each patch is kept, for a backward pass or in a compiled graph."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def fewest_calls(*numels: int) -> int:
    """In how many parts kernels can index tensors of so many elements."""
    return max(ceil_div(max(numels), INDEX_LIMIT - 1), 1)


def choose_patch_rows(
    splits: int | str,
    rows: int,
    local: Tensor | Recipe,
    weight: Tensor,
    out_numel: int,
    min_numel: int = 0,
    workspace_bytes: int | None = None,
) -> int:
    """Output rows a patch: what ``splits`` asks for, and never more elements than kernels can index.

    ``rows``: output rows of this rank; ``out_numel``: elements of its output; a number of splits holds from
    ``min_numel`` elements of the input on. ``splits="auto"``: the fewest patches of which each, input and output
    together, has at most ``workspace_bytes``, but not so small that the weights, which are packed anew at
    every call, weigh in; without gradients.
    """
    numel, size = local.shape.numel(), local.dtype.itemsize
    fewest = fewest_calls(numel, out_numel)
    if isinstance(splits, int):
        fewest = max(fewest, splits if numel >= min_numel else 1)
    elif not _is_recorded():
        budget = workspace_bytes or sizes_of(local.device).workspace_bytes
        patch = max(budget, PATCH_PER_WEIGHT * weight.numel() * size)
        total = size * (numel + out_numel)
        if 3 * patch <= 2 * total:
            fewest = max(fewest, ceil_div(total, patch))
    return max(ceil_div(rows, fewest), 1)
