"""How many rows at a time one rank computes, and what each patch of them reads: integers only, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from distpatch.layout.stencil import Interval, ceil_div
from distpatch.layout.transfers import RankPlan
from distpatch.torch_utils.chunk_sizes import sizes_for

PATCH_PER_WEIGHT = 8  # bytes of a patch for each of the weights, which a CPU packs anew at every call
Seams = tuple[tuple[int, int, Interval], ...]  # (first output row, last, the rows that they read)
INDEX_LIMIT = 2**31  # elements of an input or output that kernels with 32-bit indices can address


@dataclass(frozen=True, eq=False)
class Cut:
    """How a rank's output ``rows`` are computed: ``patch_rows`` at a time, of which each ``reads`` (by its first row).

    ``seams``: instead, its own rows are taken for the image, padded as the image is, and these rows are mended;
    ``together``: the patches are one batch.
    """

    rows: Interval
    patch_rows: int
    reads: dict[int, Interval]
    seams: Seams | None = None
    together: bool = False

    def strips(self, own: Interval) -> tuple[Interval, ...]:
        """The rows that each seam reads of the rank's ``own``, counted from the first of these."""
        return tuple((max(a - own[0], 0), min(b, own[1]) - own[0]) for _, _, (a, b) in self.seams or ())


class Share(NamedTuple):
    """A rank's share of a call: output ``rows``, elements of its in- and output, and what else says how they are cut.

    ``kind``: of device (chunk_sizes.py); ``recorded``: each patch is kept, for a backward pass or in a compiled graph;
    ``outer``: the rows are sharded over an inner axis.
    """

    rows: int
    numel: int
    out_numel: int
    itemsize: int
    kind: str
    recorded: bool
    outer: bool = False


def cut_rows(
    stencil: Any,
    plan: RankPlan,
    patch_rows: int,
    share: Share,
    *,
    pads: bool = False,
    view: bool = False,
    together: bool = False,
    weights: int = 0,
) -> Cut:
    """How rows are best computed, at most ``patch_rows`` at a time. ``view``: the result is one.

    Rows that are fewer than the ``weights``, in elements, are put beside their halo rather than mended: a call for each
    seam would read, and on a CPU pack, all weights again. So are those of an outer axis, without gradients: each call
    is a round of the inner one.
    """
    (lo, hi), (first, last), (start, stop) = plan.rows, plan.read, plan.own
    if lo == hi:
        return Cut(plan.rows, 1, {0: plan.read})
    starts = list(range(lo, hi, patch_rows))
    if len(starts) > 1 and together:  # the last overlaps its neighbour to be as tall
        starts[-1] = hi - patch_rows
        return Cut(plan.rows, patch_rows, {a: stencil.need(a, a + patch_rows) for a in starts}, together=True)
    if len(starts) == 1 and share.outer and not share.recorded:
        return Cut(plan.rows, patch_rows, {lo: plan.read})
    sizes, own_bytes = sizes_for(share.kind), share.numel * share.itemsize
    joined_bytes = max(sizes.joined_bytes, weights * share.itemsize)
    if len(starts) == 1 and pads and plan.seams is not None and (own_bytes > joined_bytes or not plan.seams):
        return Cut(plan.rows, patch_rows, {lo: plan.read}, plan.seams)
    if len(starts) == 1 and not ((start <= first and last <= stop) or view or share.recorded):
        # with its halo they are copied: a part at a time, where there are many
        parts = ceil_div(own_bytes, sizes.part_bytes)
        patch_rows = ceil_div(hi - lo, min(max(parts, 1), sizes.most_parts))
    reads = {a: stencil.need(a, min(a + patch_rows, hi)) for a in range(lo, hi, patch_rows)}
    return Cut(plan.rows, patch_rows, reads)


def fewest_calls(*numels: int) -> int:
    """In how many parts kernels can index tensors of so many elements."""
    return max(numels) // INDEX_LIMIT + 1


class Options(Protocol):
    """How convolutions are cut (``convert_model``)."""

    @property
    def splits(self) -> int | str: ...
    @property
    def min_numel(self) -> int: ...
    @property
    def workspace_bytes(self) -> int | None: ...


def choose_patch_rows(options: Options, share: Share, weights: int) -> int:
    """Output rows a patch: what ``options.splits`` asks for, and never more elements than kernels can index.

    A number of splits holds from ``min_numel`` elements of the input on. ``splits="auto"``: the fewest patches of which
    each, input and output together, has at most ``workspace_bytes``, but not so small that the ``weights``, as many
    elements, which are packed anew at every call, weigh in; without gradients.
    """
    fewest = fewest_calls(share.numel, share.out_numel)
    if isinstance(options.splits, int):
        fewest = max(fewest, options.splits if share.numel >= options.min_numel else 1)
    elif not share.recorded:
        budget = options.workspace_bytes or sizes_for(share.kind).workspace_bytes
        patch = max(budget, PATCH_PER_WEIGHT * weights * share.itemsize)
        total = share.itemsize * (share.numel + share.out_numel)
        if 3 * patch <= 2 * total:
            fewest = max(fewest, ceil_div(total, patch))
    return max(ceil_div(share.rows, fewest), 1)
