"""Rows of one rank, computed now: whole, with the seams mended, or a patch of rows at a time.

No padded copy of the rows is ever made: patches read the rank's own rows and the halo pieces, and write
into one output.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from distpatch.layout.stencil import Interval, ceil_div
from distpatch.lazy.patch_plan import Cut, Seams, fewest_calls
from distpatch.torch_utils.constants import blank
from distpatch.torch_utils.memory_format import format_by_strides, memory_format
from distpatch.torch_utils.overridable import has_rules
from distpatch.torch_utils.private import FakeTensor
from distpatch.torch_utils.tree import map_tensors

T = TypeVar("T")


# (rows, start, lo, hi, *weights): output rows [lo, hi), one tensor or several, of input rows of which ``start`` is the
# first: all that they read, of an image that ``fill`` surrounds. If it ``pads``, also of the image alone.
Kernel = Callable[..., Any]
Landed = Callable[[], object]  # waits for halo rows
RowsAt = Callable[[int, int, "Tensor | None"], Any]  # (start, stop, where to write them, perhaps) -> rows


def nothing_to_wait_for() -> None:
    """Of halo rows that are there."""


class Slab(NamedTuple):
    """The rows of an image of ``size`` rows that one rank can read; beyond the image they are ``fill``.

    ``pieces``: (first global row, tensor) in ascending order; ``local`` of them is the rank's own, which may be
    a ``Recipe``: then ``rows`` is told how to ``take`` some. The others are there once ``landed`` was called.
    ``strips``: copies of those own rows that each seam reads.
    """

    pieces: tuple[tuple[int, Any], ...]
    local: int
    dim: int
    size: int
    fill: float = 0.0
    landed: Landed = nothing_to_wait_for
    strips: tuple[Tensor, ...] = ()

    def strip(self, index: int) -> Callable[[int, int], Tensor] | None:
        """What a seam takes of the rank's own rows, where autograd is to know of it by itself."""
        return (lambda lo, hi: self.strips[index]) if self.strips else None

    @property
    def own(self) -> tuple[int, int, Any]:
        first, tensor = self.pieces[self.local]
        return first, first + tensor.shape[self.dim], tensor

    def needs_halo(self, lo: int, hi: int) -> bool:
        """Whether any of these rows are other ranks'."""
        start, stop, _ = self.own
        return max(lo, 0) < start or stop < min(hi, self.size)

    def rows(self, lo: int, hi: int, take: Callable[[int, int], Tensor] | None = None) -> Tensor:
        """Rows [lo, hi): a view where the rank's own suffice, else a copy of just these rows."""
        own, dim = self.pieces[self.local][1], self.dim
        spans = tuple([(first, first + piece.shape[dim]) for first, piece in self.pieces])
        cut = cut_pieces(lo, hi, spans, self.local, self.size)
        if cut.needs_halo:
            self.landed()
        parts = [self._padding(cut.above)] if cut.above else []
        for index, a, b in cut.parts:
            if index == self.local and take is not None:
                parts.append(take(a, b))
            else:
                piece = self.pieces[index][1]
                parts.append(piece if a == 0 and b == piece.shape[dim] else piece.narrow(dim, a, b - a))
        if cut.below:
            parts.append(self._padding(cut.below))
        if cut.parts or not isinstance(own, Tensor):
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        # Rows of padding alone would leave the autograd graph, and the halo's backward is collective.
        padding = torch.cat([own.narrow(dim, 0, 0), *parts], dim)  # whose format an empty part undoes
        return padding.contiguous(memory_format=format_of_rows(own))

    def _padding(self, rows: int) -> Tensor:
        own = self.pieces[self.local][1]
        shape = list(own.shape)
        shape[self.dim] = rows
        format = format_of_rows(own) if isinstance(own, Tensor) else own.format
        if format is torch.contiguous_format:
            if type(own) is Tensor:
                return blank(tuple(shape), self.fill, own.dtype, own.device)
            if isinstance(own, FakeTensor) and not torch.compiler.is_compiling():
                return own.new_empty(()).expand(shape)
        return torch.empty(shape, dtype=own.dtype, device=own.device, memory_format=format).fill_(self.fill)


def format_of_rows(rows: Tensor) -> torch.memory_format:
    """``memory_format``, looked up but in a compiled graph, where sizes may be symbols."""
    if type(rows) is Tensor or not torch.compiler.is_compiling():
        return format_by_strides(rows.shape, rows.stride())
    return memory_format(rows)


class CutPieces(NamedTuple):
    """Of which pieces rows are put together: ``above`` and ``below`` them rows beyond the image, ``parts``: (piece,
    first row, last) of each; ``needs_halo``: some are other ranks'."""

    above: int
    parts: tuple[tuple[int, int, int], ...]
    below: int
    needs_halo: bool


@lru_cache(maxsize=4096)
def cut_pieces(lo: int, hi: int, spans: tuple[Interval, ...], local: int, size: int) -> CutPieces:
    """Rows [lo, hi) of an image of ``size`` rows, of pieces with these rows, of which ``local`` is the rank's own."""
    above, below = max(min(hi, 0) - lo, 0), max(hi - max(lo, size), 0)
    cut = [(index, max(lo, first), min(hi, last), first) for index, (first, last) in enumerate(spans)]
    parts = tuple((index, a - first, b - first) for index, a, b, first in cut if a < b)
    assert above + below + sum(b - a for _, a, b in parts) == hi - lo, f"rows {lo}:{hi} were not all fetched"
    return CutPieces(above, parts, below, any(index != local for index, _, _ in parts))


def compute_now(kernel: Kernel, slab: Slab, cut: Cut) -> Any:
    """The rank's output rows."""
    (lo, hi), dim = cut.rows, slab.dim
    start, own = slab.pieces[slab.local]
    if lo == hi:
        first, last = cut.reads[0]
        return none_of(kernel(with_dummy_row(own.narrow(dim, 0, 0), dim, slab.fill, last - first), first, 0, 1), dim)
    if cut.seams is not None:
        return _mended(kernel, slab, cut.seams, kernel(own, start, lo, hi), lo)
    if cut.together:
        return _batched(kernel, slab, cut)

    if len(cut.reads) == 1:
        first, last = cut.reads[lo]
        return kernel(slab.rows(first, last), first, lo, hi)

    def rows_at(a: int, b: int) -> Any:
        first, last = cut.reads[a]
        return kernel(slab.rows(first, last), first, a, b)

    late = [a for a, read in cut.reads.items() if slab.needs_halo(*read)]
    return in_patches(rows_at, cut.rows, cut.patch_rows, dim, late=late)


def _mended(kernel: Kernel, slab: Slab, seams: Seams, result: Tensor, first: int) -> Tensor:
    """The result with its seams computed anew: written into it, or, if autograd may keep it, put together with it."""
    dim, recorded = slab.dim, result.requires_grad and torch.is_grad_enabled()
    parts, done, stop = [], first, first + result.shape[dim]
    for index, (a, b, read) in enumerate(seams):
        seam = kernel(slab.rows(*read, slab.strip(index)), read[0], a, b)
        if not recorded:
            result.narrow(dim, a - first, b - a).copy_(seam)
            continue
        parts += [result.narrow(dim, done - first, a - done), seam] if done < a else [seam]
        done = b
    if not parts:
        return result
    rest = [result.narrow(dim, done - first, stop - done)] if done < stop else []
    return torch.cat(parts + rest, dim)


def _batched(kernel: Kernel, slab: Slab, cut: Cut) -> Tensor:
    """Patches folded into the batch, one call."""
    (lo, hi), reads = cut.rows, list(cut.reads.values())
    result = kernel(torch.cat([slab.rows(*read) for read in reads], 0), reads[0][0], lo, lo + cut.patch_rows)
    *full, last = rearrange(result, "(patch n) ... -> patch n ...", patch=len(reads))
    fresh = hi - lo - cut.patch_rows * len(full)
    last = last.narrow(slab.dim, cut.patch_rows - fresh, fresh)
    return torch.cat([*full, last], slab.dim)


def rows_now(
    step: Callable[..., Tensor],
    parts: Sequence[Tensor],
    dim: int,
    *,
    need: Callable[[int, int], Interval] | None = None,
    shape: Sequence[int] | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """What ``step`` (``Step``, deferred_ops.py) makes of rows of the parts; all, or of those that ``need`` says.

    With ``need`` never of more elements at a time than kernels can index.
    """
    rows = parts[0].shape[dim] if shape is None else shape[dim]
    if need is not None and parts[0].shape[dim] == rows == 0:
        dummies = [with_dummy_row(part, dim) for part in parts]
        made: Tensor = none_of(step(dummies, [], 0, 1), dim)
        return made
    if need is not None and shape is not None:
        chunk_rows = ceil_div(rows, fewest_calls(parts[0].numel(), math.prod(shape)))
    if chunk_rows is None or chunk_rows >= rows:
        return step(parts, [], 0, rows)

    def rows_at(lo: int, hi: int, place: Tensor | None = None) -> Tensor:
        start, stop = need(lo, hi) if need else (lo, hi)
        spare = [] if place is None else [place]
        return step([part.narrow(dim, start, stop - start) for part in parts], spare, lo, hi)

    if need is not None:
        made = in_patches(rows_at, (0, rows), chunk_rows, dim)
    else:
        made = collect(rows_at, (0, rows), chunk_rows, dim, torch.empty_like(parts[0]))
    return made


def with_dummy_row(rows: Tensor, dim: int, fill: Any = 0, count: int = 1) -> Tensor:
    """The rows; of an idle rank, which has none, ``count`` of ``fill``.

    Kernels refuse empty images, and an idle rank must keep its place in the autograd graph: the same operations
    as on other ranks, so that derivatives of any order reach the same exchanges.
    """
    if rows.shape[dim] > 0:
        return rows
    blank = rows.new_full([count if d == dim % rows.ndim else n for d, n in enumerate(rows.shape)], fill)
    return torch.cat([rows, blank], dim).contiguous(memory_format=memory_format(rows))


def none_of(result: Any, dim: int) -> Any:
    """No rows of one tensor or several; no view, so that a write to them is recorded as on other ranks."""
    return map_tensors(lambda t: t.narrow(dim, 0, 0).clone(), result)


def in_patches(
    rows_at: Callable[[int, int], Any], out: Interval, patch_rows: int, dim: int, late: Collection[int] = ()
) -> Any:
    """Output rows ``out``, computed by ``rows_at(start, stop)`` for ``patch_rows`` at a time; one tensor or several.

    ``late``: first rows of patches that come after the others (without gradients).
    """
    lo, hi = out
    if patch_rows >= hi - lo:
        return rows_at(lo, hi)
    if torch.is_grad_enabled():
        return joined([rows_at(a, min(a + patch_rows, hi)) for a in range(lo, hi, patch_rows)], dim)
    return collect(lambda a, b, place: rows_at(a, b), out, patch_rows, dim, late=late)


def collect(
    rows_at: RowsAt,
    out: Interval,
    patch_rows: int,
    dim: int,
    whole: Any = None,
    *,
    format: torch.memory_format | None = None,
    last_too: bool = False,
    late: Collection[int] = (),
) -> Any:
    """The same without gradients: in ``whole``, or in new tensors of the patches' memory format, or ``format``.

    ``rows_at`` is given the place of its rows, where there is one already: it may write them there, or return others.
    """
    lo, hi = out
    for a in patches_to_run(range(lo, hi, patch_rows), last_too, late):
        b = min(a + patch_rows, hi)
        place = whole.narrow(dim, a - lo, b - a) if isinstance(whole, Tensor) else None
        rows = rows_at(a, b, place)
        if isinstance(rows, tuple):
            whole = whole or [None] * len(rows)
            whole = [_put(each, held, a, out, dim, format) for each, held in zip(rows, whole, strict=True)]
        else:
            whole = _put(rows, whole, a, out, dim, format)
        del rows
    return whole if isinstance(whole, Tensor) else tuple(whole)


class _Thread(threading.local):
    choose: Callable[[Sequence[Any], bool, Collection[Any]], Iterable[Any]] | None = None


_thread = _Thread()


def patches_to_run(patches: Sequence[T], last_too: bool = False, late: Collection[T] = ()) -> Iterable[T]:
    """All patches, those after the others that are ``late``; in a planned run, those that the planner chooses.

    ``last_too``: all are alike but for the first; else also but for the last.
    """
    if _thread.choose is not None:
        return _thread.choose(patches, last_too, late)
    return sorted(patches, key=late.__contains__) if late else patches


@contextmanager
def chosen_by(choose: Callable[[Sequence[Any], bool, Collection[Any]], Iterable[Any]]) -> Iterator[None]:
    """In this thread, patches are run that a planner chooses."""
    before, _thread.choose = _thread.choose, choose
    try:
        yield
    finally:
        _thread.choose = before


def _put(
    rows: Tensor, whole: Tensor | None, at: int, out: Interval, dim: int, format: torch.memory_format | None
) -> Tensor:
    lo, hi = out
    if whole is None:
        shape = [hi - lo if d == dim else n for d, n in enumerate(rows.shape)]
        format = format or format_of_rows(rows)
        whole = empty_beside(rows, shape, format)
    place = whole.narrow(dim, at - lo, rows.shape[dim])
    if own_part(rows).storage_offset() != own_part(place).storage_offset() or not same_memory(rows, place):
        place.copy_(rows)
    return whole


def empty_beside(rows: Tensor, shape: Sequence[int], format: torch.memory_format) -> Tensor:
    """A tensor of another shape to be filled, sharded over an inner axis where the rows are."""
    if type(rows) is Tensor or not has_rules(rows):
        return torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=format)
    for dim, size in enumerate(shape):
        if size != rows.shape[dim]:
            rows = rows.narrow(dim, 0, 1).expand([size if d == dim else n for d, n in enumerate(rows.shape)])
    return torch.empty_like(rows, memory_format=format)


def own_part(rows: Tensor) -> Tensor:
    """Of rows that are sharded themselves this rank's part of them; others as they are."""
    while type(rows) is not Tensor and (inner := getattr(rows, "local", None)) is not None:
        rows = inner
    return rows


def memory_of(rows: Tensor) -> int:
    """Which memory they stand in; of rows that are sharded themselves, this rank's part of them."""
    return own_part(rows).untyped_storage()._cdata


def same_memory(one: Tensor, other: Tensor) -> bool:
    return one is other or memory_of(one) == memory_of(other)


def joined(parts: Sequence[Any], dim: int) -> Any:
    """Parts of a tensor, or of several, put together."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts), dim)
    return type(parts[0])(joined(each, dim) for each in zip(*parts))
