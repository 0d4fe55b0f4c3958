"""Deferred evaluation of one rank's rows (inference only).

A ``Recipe`` stands for this rank's rows of a tensor that does not exist yet: a function from an interval of
rows to a tensor, over other recipes or over rows that exist. A ``Walk`` evaluates one from its first row to its
last, some rows at a time, so that no intermediate is ever materialised. What a window (a convolution)
reads again is carried from patch to patch; so a result may be written over rows that have no other reference.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distpatch.errors import DistPatchError
from distpatch.lazy.buffer_reuse import deferred_rows, is_only_holder, nobody, pending
from distpatch.lazy.row_patches import collect
from distpatch.profiling.op_costs import attributed_to, running
from distpatch.profiling.trace import Recorder
from distpatch.torch_utils.chunk_sizes import sizes_of
from distpatch.torch_utils.memory_format import format_by_order

Part = tuple[Tensor, bool]  # rows, and whether who gets them may write to them
Compute = Callable[["Walk", int, int], Part]

LEAST_BYTES = 1 << 20  # of a result: below that, deferring costs more than it saves
MOST_STEPS = 32  # of one recipe; longer ones are computed
MOST_HELD = 3  # times its own size that a recipe may keep alive


class Recipe:
    """Rows (..., rows, ...) of one rank, to be computed; or, as ``value``, computed.

    ``compute(walk, lo, hi)`` gives its local rows [lo, hi). ``row_aligned``: row i is made of rows i of its parents, or
    of rows that a window has not passed yet. ``expensive``: not to be computed twice. ``patch_rows``: how many at a
    time, where that matters. ``top_last``: its first rows are best computed last, as they are made of other
    ranks' rows.
    """

    __slots__ = (
        "__weakref__",
        "compute",
        "consumers",
        "device",
        "dim",
        "dtype",
        "expensive",
        "format",
        "op",
        "owner",
        "parents",
        "patch_rows",
        "row_aligned",
        "shape",
        "steps",
        "top_last",
        "value",
    )
    row_aligned: bool
    compute: Compute | None
    consumers: int
    device: torch.device
    dim: int
    dtype: torch.dtype
    format: torch.memory_format
    expensive: bool
    op: str
    owner: Callable[[], Any]
    parents: tuple[Recipe, ...]
    patch_rows: int | None
    shape: torch.Size
    steps: int
    top_last: bool
    value: Tensor | None

    def __init__(
        self,
        like: Tensor | Recipe,
        dim: int,
        parents: Sequence[Recipe] = (),
        compute: Compute | None = None,
        shape: Sequence[int] | None = None,
        *,
        op: str = "",
        dtype: torch.dtype | None = None,
        format: torch.memory_format | None = None,
        row_aligned: bool = True,
        expensive: bool = False,
        patch_rows: int | None = None,
        top_last: bool = False,
    ) -> None:
        self.op = op
        self.dim = dim
        self.shape = torch.Size(like.shape if shape is None else shape)
        self.dtype = dtype or like.dtype
        self.device = like.device
        found = like.format if isinstance(like, Recipe) else format_by_order(like.shape, like.stride())
        self.format = format or found or torch.contiguous_format
        self.parents = tuple(parents)
        self.compute = compute
        self.row_aligned = row_aligned and all(parent.row_aligned for parent in parents)
        self.expensive = expensive or any(parent.expensive and parent.value is None for parent in parents)
        self.steps = 1 + max((parent.steps for parent in parents), default=0)
        if patch_rows is None:
            of_parents = [
                max(self.num_rows * parent.patch_rows // max(parent.num_rows, 1), 1)
                for parent in parents
                if parent.patch_rows
            ]
            patch_rows = min(of_parents, default=None)
        self.patch_rows, self.top_last = patch_rows, top_last
        self.value = None
        self.owner = nobody
        self.consumers = 0  # recipes that read it, and convolutions
        for parent in self.parents:
            parent.consumers += 1

    @classmethod
    def of(cls, rows: Tensor, dim: int) -> Recipe:
        """Rows that exist."""
        leaf = cls(rows, dim)
        leaf.value, leaf.steps = rows, 0
        return leaf

    def belong_to(self, tensor: Any) -> None:
        """Note which tensor stands for these rows, which are known to be pending until they are computed."""
        self.owner = weakref.ref(tensor)
        if self.value is None:
            pending.rows.add(weakref.ref(self, pending.rows.discard))

    @property
    def num_rows(self) -> int:
        return self.shape[self.dim]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def sample(self, rows: int = 0) -> Tensor:
        """A tensor of its kind, of other values."""
        shape = [rows if d == self.dim else n for d, n in enumerate(self.shape)]
        return torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=self.format)

    def leaves(self) -> list[Recipe]:
        """The rows that exist, and that it is made of, each once."""
        found: dict[Recipe, None] = {}
        for node in self._nodes():
            if node.value is not None:
                found[node] = None
        return list(found)

    def _nodes(self) -> Iterator[Recipe]:
        """It and all that it is made of, each once."""
        seen, nodes = {self}, [self]
        while nodes:
            node = nodes.pop()
            yield node
            if node.value is None:
                fresh = [parent for parent in node.parents if parent not in seen]
                seen.update(fresh)
                nodes += fresh

    @property
    def held_bytes(self) -> int:
        """Bytes that it keeps alive."""
        return sum(leaf.size_bytes for leaf in self.leaves())

    @property
    def is_wanted(self) -> bool:
        """Whether a tensor still stands for it: one that was written to has another recipe."""
        owner = self.owner()
        return owner is not None and owner.__dict__.get("recipe") is self

    def evaluate(self, lo: int, hi: int) -> Tensor:
        """Some of the rows."""
        with _plainly(self.device):
            return Walk().rows(self, lo, hi)[0]

    def materialize(self) -> Tensor:
        """All rows, computed once; what they were made of is let go."""
        if self.value is None:
            with _plainly(self.device):
                self.value = self._collect()
            self.parents, self.compute, self.steps, self.expensive, self.row_aligned = (), None, 0, False, True
            self.patch_rows = None
            pending.rows.discard(weakref.ref(self))
        return self.value

    def _collect(self) -> Tensor:
        spare = next((leaf for leaf in self.leaves() if self._may_overwrite(leaf)), None) if self.row_aligned else None
        steps = [node for node in self._nodes() if node.value is None]
        Recorder.fused(" > ".join(node.op for node in reversed(steps)), sum(node.size_bytes for node in steps[1:]))
        try:
            return self._rows_by_patch(spare)
        except BaseException:
            if spare is not None:
                self.compute = partial(_lost, self)
            raise

    def _rows_by_patch(self, spare: Recipe | None) -> Tensor:
        rows, dim = self.num_rows, self.dim
        step = self.patch_rows or self._chunk_rows()
        once = all(node.consumers < 2 for node in self._nodes())  # then steps may write to what they read, too
        top_last = any(node.top_last for node in self._nodes() if node.value is None)
        walk = Walk(spare if once else None, overwrites=spare is not None, top_last=top_last)
        if spare is None and step >= rows:
            part, fresh = walk.rows(self, 0, rows)
            if format_by_order(part.shape, part.stride()) is not self.format:
                return part.clone(memory_format=self.format)
            return part if fresh else part.clone()

        def rows_at(lo: int, hi: int, place: Tensor | None) -> Tensor:
            part, _ = walk.rows(self, lo, hi)
            walk.forget()
            return part

        late = (0,) if top_last else ()
        last_too, whole = not self.expensive and rows % step == 0, None if spare is None else spare.value
        result: Tensor = collect(rows_at, (0, rows), step, dim, whole, format=self.format, last_too=last_too, late=late)
        return result

    def _chunk_rows(self) -> int:
        return max(sizes_of(self.device).chunk_bytes * self.num_rows // max(self.size_bytes, 1), 1)

    def _may_overwrite(self, leaf: Recipe) -> bool:
        """Whether the result may take the place of rows that are read for it alone."""
        rows = leaf.value
        assert rows is not None
        if (rows.shape, rows.dtype, leaf.format) != (self.shape, self.dtype, self.format):
            return False
        del rows
        return is_only_holder(leaf) and not any(
            other is not self and leaf in other.leaves() for other in deferred_rows()
        )


def _lost(recipe: Recipe, walk: Walk, lo: int, hi: int) -> Part:
    raise DistPatchError(
        f"{recipe.op}: computing these rows, of shape {tuple(recipe.shape)}, failed halfway, when a part of what they "
        "are made of had been overwritten. Run the model again."
    )


class Walk:
    """One evaluation, from above to below; ``top_last``: from its second patch on, and then the first.

    ``overwrites``: what is made of some rows takes their place, so that no window can read them again; ``spare``:
    whose rows each step may write to as soon as it has read them.
    """

    def __init__(self, spare: Recipe | None = None, overwrites: bool = False, top_last: bool = False) -> None:
        self.spare = spare
        self.overwrites = overwrites
        self._heads: dict[Any, tuple[int, Tensor]] | None = {} if top_last else None
        self._passed: dict[Any, int] = {}
        self._known: dict[tuple[Recipe, int, int], Tensor] = {}
        self._carried: dict[Any, tuple[int, Tensor]] = {}

    def rows(self, recipe: Recipe, lo: int, hi: int) -> Part:
        if recipe.value is not None:
            return recipe.value.narrow(recipe.dim, lo, hi - lo), recipe is self.spare
        known = self._known.get((recipe, lo, hi))
        if known is not None:
            return known, False
        assert recipe.compute is not None
        if running.meters:
            part, mine = attributed_to(recipe.op, recipe.compute, self, lo, hi)
        else:
            part, mine = recipe.compute(self, lo, hi)
        if recipe.consumers > 1:  # perhaps of this very recipe
            self._known[recipe, lo, hi] = part
            mine = False
        return part, mine

    def forget(self) -> None:
        """What several steps of one patch share."""
        self._known.clear()

    def window(
        self, key: Any, start: int, stop: int, follow: int, above: int, dim: int, read: Callable[[int, int], Tensor]
    ) -> Tensor:
        """Rows [start, stop) by ``read``, of which those from ``follow`` on are kept for the next time.

        ``above``: where the rows end that the output row above these reads.
        """
        head = None if self._heads is None else self._heads.get(key)
        if head is not None and start < head[0] <= stop == head[0] + head[1].shape[dim]:  # the first patch, last
            return torch.cat([read(start, head[0]), head[1]], dim) if head[0] < stop else read(start, stop)
        first, carried = self._carried.pop(key, (0, None))
        if carried is not None and first <= start <= first + carried.shape[dim] <= stop:
            last = first + carried.shape[dim]
            parts = [carried.narrow(dim, start - first, last - start)]
            if last < stop:
                parts.append(read(last, stop))
            rows = torch.cat(parts, dim)
        else:
            assert not self.overwrites or start >= self._passed.get(key, start), f"rows from {start} on are gone"
            rows = read(start, stop)
        if self._heads is not None and head is None:
            self._heads[key] = start, rows.narrow(dim, 0, max(above - start, 0)).clone()
        self._passed[key] = stop
        if start <= follow < stop:
            self._carried[key] = follow, rows.narrow(dim, follow - start, stop - follow).clone()
        return rows


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """No gradients, and each step in the dtype that it was deferred with."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
