"""Rows of its neighbours that a rank has beside its own, so that an operation which reads them need not fetch them.

They came with the moments of a norm; element-wise functions are applied to them, too. Nothing that any rank writes
to the tensor reaches them, so that they are let go when something is written to any tensor: which only the call tells
all ranks alike, as what is written may be the rows of some of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distpatch.layout.rows import EMPTY, Needs
from distpatch.tensor.patch_tensor import PatchTensor, version_of


class HaloRows(NamedTuple):
    """``rows``: those of ``needs[rank]`` one behind the other.

    ``written``: how often this thread had let go by then; ``version``: of the rank's own rows, as soon as they exist,
    to which somebody may write past all rules.
    """

    needs: Needs
    rows: Tensor
    written: int
    version: int | None


class _Thread(threading.local):
    """``some``: whether any tensor may have halo rows that count."""

    written = 0
    some = False


live = _Thread()


def bring(x: PatchTensor, needs: Needs, rows: Tensor) -> PatchTensor:
    """The tensor, with the rows of ``needs`` beside its own."""
    x.halo_rows, live.some = HaloRows(needs, rows, live.written, version_of(x.local_or_recipe)), True
    return x


def brought(x: PatchTensor) -> HaloRows | None:
    """What there is beside the rank's own rows, if nothing was written since."""
    halo: HaloRows | None = x.halo_rows
    if halo is None or halo.written != live.written or halo.version != version_of(x.local_or_recipe):
        return None
    return halo


def let_go(keeps: Any = None) -> None:
    """Before something is written: no halo rows count any longer, but those of ``keeps``, which follow."""
    halo = brought(keeps) if isinstance(keeps, PatchTensor) else None
    live.written, live.some = live.written + 1, False
    if halo is not None:
        bring(keeps, halo.needs, halo.rows)


def apply_beside(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], lead: PatchTensor, halo: HaloRows
) -> Callable[[Any], Any]:
    """What is to be done with the result of an element-wise function: the same is made of the halo rows.

    ``halo``: the lead's. Nothing where another operand brings none, or has rows itself.
    """
    operands: list[Any] = []
    for arg in args:
        if isinstance(arg, PatchTensor):
            its = halo if arg is lead else brought(arg)
            if its is None or its.needs != halo.needs:
                return _as_it_is
            operands.append(its.rows)
        elif isinstance(arg, (list, tuple)) or (isinstance(arg, Tensor) and _has_rows(arg, lead)):
            return _as_it_is
        else:
            operands.append(arg)
    if any(isinstance(arg, Tensor) for arg in kwargs.values()):
        return _as_it_is

    def of_halo(result: Any) -> Any:
        if type(result) is not PatchTensor or result.row_layout.bounds != lead.row_layout.bounds:
            return result
        return bring(result, halo.needs, func(*operands, **kwargs))

    return of_halo


def _as_it_is(result: Any) -> Any:
    return result


def _has_rows(tensor: Tensor, lead: PatchTensor) -> bool:
    at = lead.row_layout.dim - lead.ndim
    return tensor.ndim >= -at and tensor.shape[at] != 1


def halo_pieces(x: PatchTensor, needs: Needs) -> list[Tensor] | None:
    """The intervals of rows that this rank needs, if what all ranks have beside their own suffices; no gradients."""
    halo = None if torch.is_grad_enabled() else brought(x)
    if halo is None or not _suffice(halo.needs, needs):
        return None
    pieces, at, dim, rank = [], 0, x.row_layout.dim, x.region.comm.rank
    for (lo, hi), (first, last) in zip(needs[rank], halo.needs[rank], strict=True):
        start = at + lo - first if lo < hi else at
        pieces.append(halo.rows.narrow(dim, start, hi - lo))
        at += last - first
    return pieces


@lru_cache(maxsize=4096)
def _suffice(have: Needs, needs: Needs) -> bool:
    return all(
        wanted == EMPTY or (held[0] <= wanted[0] and wanted[1] <= held[1])
        for mine, others in zip(needs, have, strict=True)
        for wanted, held in zip(mine, others, strict=True)
    )
