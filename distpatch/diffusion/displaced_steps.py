"""The steps of a displaced model: which forwards wait for their exchanges, and what a picture has left so far."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from distpatch.comm.communicator import Communicator
from distpatch.diffusion.async_exchange import StepSchedule
from distpatch.diffusion.stale_transport import POLICIES, Stale, Step

T = TypeVar("T")


class Displaced:
    """The steps of one converted model: what ``displaced`` opens.

    ``calls``: forwards of this picture so far; ``synchronous``: how many, of all pictures, waited for their exchanges.
    """

    def __init__(
        self, comm: Communicator, warmup_steps: int, policy: str, layers_per_message: int, watch_prompt: bool
    ) -> None:
        self.comm = comm
        self.behaviour = POLICIES[policy]
        self.warmup_steps, self.layers_per_message, self.watch_prompt = warmup_steps, layers_per_message, watch_prompt
        self.calls = self.synchronous = 0
        self.schedule: StepSchedule | None = None
        self.texts: dict[Any, Any] = {}  # of modules that run once a prompt
        self._step: Step | None = None  # the last one
        self._signature: str | None = None
        self._given: list[Tensor] = []
        self._prompt: list[tuple[Tensor, Tensor, object]] | None = None
        self._epoch = comm.name
        self._background: Communicator | None = None

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
        if self.schedule is not None:
            self.schedule.drain()

    def _forget(self) -> None:
        self.schedule, self._step, self.calls, self._prompt = None, None, 0, None
        self.texts.clear()

    # ``model.calls.Steps``: called by a converted model, in this order.

    @property
    def sends(self) -> bool:
        return True

    def problem(self, what: str) -> str | None:
        if self.is_displaced and torch.is_grad_enabled():
            return f"{what}: a displaced step has no gradients: call the model under torch.no_grad()"
        return None

    def payload(self, replicated: list[Tensor]) -> dict[str, object]:
        """What the ranks tell each other before a step."""
        self._given = [t for t in replicated if _conditions(t)] if self.watch_prompt else []
        return {"new": self._prompt is not None and not _alike(self._prompt, self._given)}

    def begin(self, signature: str, answers: list[dict[str, object]]) -> None:
        """Choose what this step is, from what all ranks know alike."""
        comm = self.comm
        if comm.name != self._epoch:  # a call has failed: others may have started less than this rank
            self._epoch = comm.name
            self._forget()
        if self.is_displaced and self.behaviour.rows == "last":
            self._background = background_of(comm)
        if signature != self._signature or any(answer.get("new") for answer in answers):
            self.reset()
        self._signature = signature
        if self._prompt is None:
            self._prompt = [(t, t.clone(), _version(t)) for t in self._given]

    def step(self, run: Callable[[], T]) -> T:
        """One forward; where it took another path than the one before, once more, and exchanges are waited for."""
        try:
            result = self._run(run, self.schedule)
            if self._step is not None and self._step.lost:
                self.synchronize()
                self.schedule = None
                result = self._run(run, None)
        except BaseException:
            self._forget()  # nothing is waited for: who knows what the others have started
            raise
        self.calls += 1
        return result

    def _run(self, run: Callable[[], T], schedule: StepSchedule | None) -> T:
        if schedule is None:
            self.synchronous += 1
            if not self.is_displaced or self.calls < self.warmup_steps:
                return run()
        is_stale = schedule is not None
        schedule = schedule or StepSchedule(self._background or self.comm, self.layers_per_message)
        self.schedule = schedule
        step = self._step = Step(schedule, self.behaviour, is_stale)
        with self.comm.using(lambda inner: Stale(inner, step, self.comm.rank)):
            result = run()
        step.end()
        return result

    def entered(self, index: int) -> None:
        """Module number ``index`` of the model begins its forward."""
        if self._step is not None:
            self._step.module = index


# By communicator: the name of its connection, and the duplicate that runs behind the computation.
_backgrounds: weakref.WeakKeyDictionary[Communicator, tuple[str, Communicator]] = weakref.WeakKeyDictionary()


def background_of(comm: Communicator) -> Communicator:
    """The group's second duplicate: what runs behind the computation never stands in front of what is waited for.

    Every rank calls it where it may have to be made, or made again: the group's first one failed.
    """
    name, background = _backgrounds.get(comm, ("", None))
    if background is None or name != comm.name:
        background = comm.duplicate()
        _backgrounds[comm] = comm.name, background
    return background


def _conditions(tensor: Tensor) -> bool:
    """Whether a replicated argument is the same for a whole picture: no time, which has a number a sample at most."""
    return tensor.ndim >= 2


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
