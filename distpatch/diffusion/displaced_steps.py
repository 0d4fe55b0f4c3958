"""The steps of a displaced model: the policy that a communicator has while a forward runs.

Steps of a denoising loop differ little, so halo rows, statistics and keys may be those of the last step while
this step's are under way (Li et al., DistriFusion, 2024). The rules stay; only what becomes of their transfers
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distpatch.comm.collectives import merge_moments, stack_ranks
from distpatch.comm.communicator import Communicator, Parts
from distpatch.comm.row_exchange import transfer
from distpatch.diffusion.async_exchange import Key, Plan, Site
from distpatch.model.convert import STATE, is_image
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.tree import tensors_in

T = TypeVar("T")


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


class Displaced:
    """The steps of one converted model: what ``displaced`` opens.

    ``calls``: forwards of this picture so far; ``synchronous``: how many, of all pictures, waited for their exchanges.
    """

    def __init__(
        self, model: nn.Module, warmup_steps: int, policy: str, layers_per_message: int, watch_prompt: bool
    ) -> None:
        self.region = model.__dict__[STATE].region
        self.behaviour = POLICIES[policy]
        self.warmup_steps, self.layers_per_message, self.watch_prompt = warmup_steps, layers_per_message, watch_prompt
        self.calls = self.synchronous = 0
        self.plan: Plan | None = None
        self.texts: dict[Any, Any] = {}  # of modules that run once a prompt
        self._module = -1  # the one entered last
        self._at = 0  # sites passed in this step
        self._stale = self._lost = False
        self._signature: str | None = None
        self._prompt: list[tuple[Tensor, Tensor, object]] | None = None
        self._epoch = self.comm.name
        self._lane: Communicator | None = None

    @property
    def comm(self) -> Communicator:
        comm: Communicator = self.region.comm
        return comm

    @property
    def is_displaced(self) -> bool:
        """Whether any step differs from a plain one."""
        return self.comm.size > 1 and self.behaviour.rows != "fresh"

    def reset(self) -> None:
        """Begin another picture: what earlier steps left is dropped, and the warm-up begins anew.

        Every rank calls it, between two forwards.
        """
        self.synchronize()
        self._forget()

    def synchronize(self) -> None:
        """Wait for what runs behind the computation. Every rank calls it; the next step is displaced as before."""
        if self.plan is not None:
            self.plan.drain()

    def _forget(self) -> None:
        self.plan, self.calls, self._prompt = None, 0, None
        self.texts.clear()

    # Called by a converted model (model/convert.py), in this order.

    def problem(self, what: str) -> str | None:
        if self.is_displaced and torch.is_grad_enabled():
            return f"{what}: a displaced step has no gradients: call the model under torch.no_grad()"
        return None

    def payload(self, given: Any) -> dict[str, object]:
        """What the ranks tell each other before a step."""
        self._given = [t for t in tensors_in(given) if _conditions(t)] if self.watch_prompt else []
        return {"new": self._prompt is not None and not _alike(self._prompt, self._given)}

    def begin(self, signature: str, answers: list[dict[str, object]]) -> None:
        """Choose what this step is, from what all ranks know alike."""
        comm = self.comm
        if comm.name != self._epoch:  # a call has failed: others may have started less than this rank
            self._epoch = comm.name
            self._forget()
        if self.is_displaced and self.behaviour.rows == "last":
            self._lane = async_comm_of(comm)
        if signature != self._signature or any(answer.get("new") for answer in answers):
            self.reset()
        self._signature = signature
        if self._prompt is None:
            self._prompt = [(t, t.clone(), _version(t)) for t in self._given]

    def step(self, run: Callable[[], T]) -> T:
        """One forward; where it took another path than the one before, once more, and exchanges are waited for."""
        try:
            result = self._run(run, stale=self.plan is not None)
            if self._lost:
                self._abandon_plan()
                result = self._run(run, stale=False)
        except BaseException:
            self._forget()  # nothing is waited for: who knows what the others have started
            raise
        self.calls += 1
        return result

    def _abandon_plan(self) -> None:
        self.synchronize()
        self.plan = None

    def _run(self, run: Callable[[], T], stale: bool) -> T:
        self._stale, self._lost, self._at, self._module = stale, False, 0, -1
        if not stale:
            self.synchronous += 1
            if not self.is_displaced or self.calls < self.warmup_steps:
                return run()
            self.plan = Plan(self._lane or self.comm, self.layers_per_message)
        self.comm.policy = self
        try:
            result = run()
        finally:
            self.comm.policy = None
        assert self.plan is not None
        if stale:
            self._lost |= self._at != len(self.plan.sites)
        else:
            self.plan.close()
        return result

    def entered(self, index: int) -> None:
        self._module = index

    # Called by the rules, through the communicator.

    def exchange(self, op: str, key: Key, sends: Parts, recvs: Parts, device: torch.device) -> None:
        key = ("rows", op, self._module, *key)
        if not self._stale:
            transfer(self.comm, op, sends, recvs, device)
            self._record(key, sends, recvs)
        elif (site := self._site(key)) is None:
            transfer(self.comm, op, sends, recvs, device)
        else:
            site.read(recvs)
            if self.behaviour.rows == "last":
                site.write(op, sends)

    def moments(self, op: str, counts: Sequence[int], mean: Tensor, m2: Tensor) -> tuple[int, Tensor, Tensor]:
        norm, comm = self.behaviour.norm, self.comm
        rank, own = comm.rank, torch.stack([mean, m2])
        if norm == "own" and self._stale and not self._lost:
            return counts[rank], mean, m2
        if norm in {"own", "fresh"}:
            ranks = stack_ranks(own, comm.name, op)
            return merge_moments(counts, ranks[:, 0], ranks[:, 1])
        key = ("moments", op, self._module, tuple(counts), tuple(own.shape), own.dtype)
        peers = [peer for peer in range(comm.size) if peer != rank]
        site = self._site(key) if self._stale else None
        if site is None:
            ranks = stack_ranks(own, comm.name, op)
            if not self._stale:
                self._record(key, [(p, [own]) for p in peers], [(p, [ranks[p]]) for p in peers], own)
            return merge_moments(counts, ranks[:, 0], ranks[:, 1])
        last, site.own = site.own, own
        assert last is not None
        ranks = own.new_empty((comm.size, *own.shape))
        site.read([(peer, [ranks[peer]]) for peer in peers])
        site.write(op, [(peer, [own]) for peer in peers])
        ranks[rank] = own if norm == "stale" else last
        merged = merge_moments(counts, ranks[:, 0], ranks[:, 1])
        return merged if norm == "stale" else _corrected(merged, last, own, counts[rank])

    def _record(self, key: Key, sends: Parts, recvs: Parts, own: Tensor | None = None) -> None:
        assert self.plan is not None
        if self.behaviour.rows == "kept":
            sends = []
        self.plan.record(key, sends, recvs, own)

    def _site(self, key: Key) -> Site | None:
        """The site that stands here in the plan, or None from the first one on that is another. Alike on all ranks."""
        assert self.plan is not None
        sites = self.plan.sites
        self._lost |= self._at >= len(sites) or sites[self._at].key != key
        if self._lost:
            return None
        self._at += 1
        return sites[self._at - 1]


def _corrected(merged: tuple[int, Tensor, Tensor], last: Tensor, own: Tensor, count: int) -> tuple[int, Tensor, Tensor]:
    """All ranks' last statistics, plus what this rank's have changed by since.

    Of the moments E[x] and E[x²], as DistriFusion has it, written without a difference of large squares: with mean
    M and variance V of all ranks' last samples, m and v of this rank's last ones, m' and v' of its new ones, it is
    mean M + m' - m and variance V + v' - v + 2 (m' - m) (m - M). Where that is negative: v'.
    """
    total, mean, m2 = merged
    (m, v), (m_new, v_new) = ((moments[0], moments[1] / max(count, 1)) for moments in (last, own))
    moved = m_new - m
    corrected = m2 + total * (v_new - v + 2 * moved * (m - mean))
    return total, mean + moved, torch.where(corrected < 0, total * v_new, corrected)


def async_comm_of(comm: Communicator) -> Communicator:
    """The group's second duplicate: what runs behind the computation never stands in front of what is waited for.

    Every rank calls it where it may have to be made, or made again: the group's first one failed.
    """
    async_comm = comm.async_comm
    if async_comm is None or async_comm.async_for != comm.name:
        async_comm = Communicator(comm.group)
        async_comm.connect(comm.device)
        async_comm.async_for = comm.name
        comm.async_comm = async_comm
    async_comm.call = comm.call  # under which the ranks leave their notes
    return async_comm


def _conditions(tensor: Tensor) -> bool:
    """Whether it is the same for a whole picture: no image, and no time, which has a number a sample at most."""
    return tensor.ndim >= 2 and not is_image(tensor) and not isinstance(tensor, PatchTensor)


def _alike(known: list[tuple[Tensor, Tensor, object]], given: list[Tensor]) -> bool:
    return len(known) == len(given) and all(_same(*item, now) for item, now in zip(known, given, strict=True))


def _same(tensor: Tensor, copy: Tensor, version: object, now: Tensor) -> bool:
    """Whether it holds what it held; its values are only read where it is not the same memory, left alone since."""
    if (tensor.shape, tensor.dtype, tensor.device) != (now.shape, now.dtype, now.device):
        return False
    untouched = version is not None and _version(now) == version
    return (untouched and tensor.data_ptr() == now.data_ptr() and tensor.stride() == now.stride()) or torch.equal(
        copy, now
    )


def _version(tensor: Tensor) -> object:
    return None if tensor.is_inference() else tensor._version
