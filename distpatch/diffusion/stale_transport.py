"""The transport of a displaced step: what it fills in is what the last step's messages brought.

Steps of a denoising loop differ little, so halo rows, statistics and keys may be those of the last step while
this step's are under way (Li et al., DistriFusion, 2024). The rules stay; only how their tensors travel changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distpatch.comm.merging import merge_deviations
from distpatch.comm.transport import Batch, Finish, Layer, Moments, Transport
from distpatch.diffusion.async_exchange import Key, Messages, Site, StepSchedule


@dataclass(frozen=True)
class Behaviour:
    """What a policy does after the warm-up.

    ``rows``: of halos, keys and values, "fresh" (waited for), "last" (the step before), "kept" (those of the
    warm-up, nothing is sent). ``norm``: statistics, "fresh", "own" (this rank's alone), "stale" (fresh ones of
    this rank, last step's of the others) or "corrected" (last step's of all, moved by what this rank's have moved).
    """

    rows: str
    norm: str


POLICIES = {
    "full_sync": Behaviour("fresh", "fresh"),
    "sync_gn": Behaviour("last", "fresh"),
    "stale_gn": Behaviour("last", "stale"),
    "corrected_async_gn": Behaviour("last", "corrected"),
    "separate_gn": Behaviour("last", "own"),
    "no_sync": Behaviour("kept", "own"),
}


@dataclass
class Step:
    """One forward. ``is_stale``: it reads what the schedule's sites have; otherwise it waits, and records them.

    ``module``: the number of the module that was entered last; ``at``: how many sites were passed; ``lost``: a site
    was another than the schedule's, from which on exchanges are waited for.
    """

    schedule: StepSchedule
    behaviour: Behaviour
    is_stale: bool
    module: int = -1
    at: int = 0
    lost: bool = False

    def next_site(self, key: Key) -> Site | None:
        """The site that the schedule has here, or None from the first one on that is another. Alike on all ranks."""
        if not self.is_stale:
            return None
        sites = self.schedule.sites
        self.lost |= self.at >= len(sites) or sites[self.at].key != key
        if self.lost:
            return None
        self.at += 1
        return sites[self.at - 1]

    def record(self, key: Key, sends: Messages, recvs: Messages, own: Tensor | None = None) -> None:
        if not self.is_stale:
            self.schedule.record(key, [] if self.behaviour.rows == "kept" else sends, recvs, own)

    def end(self) -> None:
        """The forward is over."""
        if self.is_stale:
            self.lost |= self.at != len(self.schedule.sites)
        else:
            self.schedule.close()


class Stale(Layer):
    """Rows and moments of the step before, while this step's are under way; what has no key is waited for."""

    def __init__(self, inner: Transport, step: Step, rank: int) -> None:
        super().__init__(inner)
        self.step, self.rank = step, rank

    def exchange(self, batch: Batch) -> None:
        if batch.key is None:
            return self.inner.exchange(batch)
        step = self.step
        key = ("rows", batch.op, step.module, *batch.key)
        site = step.next_site(key)
        if site is None:
            self.inner.exchange(batch)
            step.record(key, list(zip(batch.to, batch.outgoing)), list(zip(batch.source, batch.landing)))
            return
        site.read(batch.landing)
        if step.behaviour.rows == "last":
            site.write(batch.op, batch.outgoing)

    def begin(self, batch: Batch) -> Finish:
        if batch.key is None:
            return self.inner.begin(batch)
        self.exchange(batch)  # what a site has is there, and what it gets is recorded in the order of the sites
        return _nothing

    def known_moments(self, counts: Sequence[int], own: Tensor, op: str) -> Moments | None:
        step, norm, rank = self.step, self.step.behaviour.norm, self.rank
        if norm == "own" and step.is_stale and not step.lost:
            return counts[rank : rank + 1], own.unsqueeze(0)
        if norm in {"own", "fresh"}:
            return None
        key = ("moments", op, step.module, tuple(counts), tuple(own.shape), own.dtype)
        peers = [peer for peer in range(len(counts)) if peer != rank]
        site = step.next_site(key)
        if site is None:
            ranks = self.inner.all_gather(own, op)
            step.record(key, [(peer, own) for peer in peers], [(peer, ranks[peer]) for peer in peers], own)
            return counts, ranks
        last, site.own = site.own, own
        assert last is not None
        ranks = own.new_empty((len(counts), *own.shape))
        site.read([ranks[peer] for peer in peers])
        site.write(op, [own] * len(peers))
        ranks[rank] = own if norm == "stale" else last
        return (counts, ranks) if norm == "stale" else _corrected(counts, ranks, own, rank)

    def carries_rows(self) -> bool:
        return False


def _nothing() -> None:
    return None


def _corrected(counts: Sequence[int], ranks: Tensor, own: Tensor, rank: int) -> Moments:
    """All ranks' last moments (``ranks``), merged, plus what this rank's have changed by since.

    Of the moments E[x] and E[x²], as DistriFusion has it, written without a difference of large squares: with mean
    M and variance V of all ranks' last samples, m and v of this rank's last ones, m' and v' of its new ones, it is
    mean M + m' - m and variance V + v' - v + 2 (m' - m) (m - M). Where that is negative: v'. Every rank is given these.
    """
    mean, deviation = merge_deviations(counts, ranks, 0.0)
    (m, d), (m_new, d_new) = ranks[rank], own
    moved = m_new - m
    change = d_new.square() - d.square() + 2 * moved * (m - mean)
    corrected = deviation.square() + change
    spread = torch.where(corrected < 0, d_new, corrected.clamp(min=0).sqrt())
    stays = (moved == 0) & (change == 0)  # then the result is the last one, to the bit
    return counts, torch.where(stays, ranks, torch.stack([mean + moved, spread]))
