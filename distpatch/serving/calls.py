"""The calls of a server's autoencoder on all its ranks: whole pictures where the server would cut tiles."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed import ProcessGroup

from distpatch.errors import DistPatchError
from distpatch.model.convert import convert_model, is_converted
from distpatch.model.restore import restore_model

SWITCH = "DISTPATCH_SERVING"
METHODS = ("encode", "decode")
SERVED = "_distpatch_served"  # the attribute of a model whose calls are sharded


def is_asked_for() -> bool:
    """Whether this server shall use distpatch: being installed in its environment is not enough."""
    return os.environ.get(SWITCH, "") not in {"", "0"}


class SetAside(NamedTuple):
    """An attribute that has another ``value`` while a call runs, because by its own the server would cut tiles."""

    owner: Any
    name: str
    value: object


class ShardedCalls:
    """``vae.encode`` and ``vae.decode`` of a server, which all of its ranks call: each computes its rows.

    ``group``: says, at each call, on which ranks; None: on this one alone, as the server has it. The model is converted
    by the first call on a group: servers load weights after they have built a model. ``dim``: as of ``convert_model``.
    Raises ``DistPatchError`` for a model that is converted already, or whose calls are sharded.
    """

    def __init__(
        self, vae: nn.Module, group: Callable[[], ProcessGroup | None], dim: int, aside: Sequence[SetAside]
    ) -> None:
        if is_converted(vae) or SERVED in vae.__dict__:
            raise DistPatchError(f"{type(vae).__name__} is converted already: restore_model, or release, undoes that")
        self.vae, self.group, self.dim, self.aside = vae, group, dim, aside
        self._calls = {name: getattr(vae, name) for name in METHODS if callable(getattr(vae, name, None))}
        self.names = tuple(self._calls)
        self._install()
        vae.__dict__[SERVED] = self

    @contextmanager
    def whole(self) -> Iterator[ProcessGroup | None]:
        """The model converted, and without tiles as long as this is open; yields the group."""
        group = self.group()
        if group is None:
            yield None
            return
        before = [SetAside(owner, name, getattr(owner, name)) for owner, name, _ in self.aside]
        _set(self.aside)
        try:
            self._convert(group)
            yield group
        finally:
            _set(before)

    def _convert(self, group: ProcessGroup) -> None:
        if is_converted(self.vae):
            return
        for name in self.names:
            del self.vae.__dict__[name]
        try:
            convert_model(self.vae, group, dim=self.dim)
            self._calls = {name: getattr(self.vae, name) for name in self.names}
        finally:
            self._install()

    def _install(self) -> None:
        for name, function in self._calls.items():
            self.vae.__dict__[name] = functools.wraps(function)(functools.partial(self._call, name))

    @torch.compiler.disable
    def _call(self, name: str, *args: Any, on_frames: Callable[[Any], None] | None = None, **kwargs: Any) -> Any:
        """``on_frames``: a callback of SGLang for frames as they are finished; it gets them all at the end."""
        with self.whole() as group:
            if group is None and on_frames is not None:
                return self._calls[name](*args, on_frames=on_frames, **kwargs)
            result = self._calls[name](*args, **kwargs)
        if on_frames is not None:
            on_frames(result)
        return result


def served(vae: nn.Module) -> ShardedCalls | None:
    """The calls of a model that are sharded, if they are."""
    calls: ShardedCalls | None = vae.__dict__.get(SERVED)
    return calls


def release(vae: nn.Module) -> None:
    """Give a model its own calls back; every rank calls it."""
    if (calls := vae.__dict__.pop(SERVED, None)) is None:
        return
    if is_converted(vae):
        restore_model(vae)
        return
    for name in calls.names:
        del vae.__dict__[name]


def _set(attributes: Sequence[SetAside]) -> None:
    for owner, name, value in attributes:
        setattr(owner, name, value)
