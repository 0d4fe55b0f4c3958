"""Displaced patch parallelism: each forward of a model is a step that does not wait for the other ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from distpatch.diffusion.displaced_steps import Displaced
from distpatch.diffusion.stale_transport import POLICIES
from distpatch.errors import DistPatchError
from distpatch.model.calls import Conversion, conversion_of
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils.tree import tensors_in

__all__ = ["POLICIES", "Displaced", "displaced", "synchronize"]
CPU = torch.device("cpu")


class _Open(threading.local):
    def __init__(self) -> None:
        self.contexts: list[Displaced] = []


_open = _Open()


@contextmanager
def displaced(
    model: nn.Module,
    *,
    warmup_steps: int = 4,
    policy: str = "corrected_async_gn",
    layers_per_message: int = 16,
    once_per_prompt: Sequence[str] = (),
    watch_prompt: bool = True,
) -> Iterator[Displaced]:
    """While it is open, each forward of a converted model is one denoising step, with the last step's exchanges.

    The first ``warmup_steps + 1`` forwards wait for their exchanges, as in DistriFusion. After them halo rows,
    keys and values, and the statistics of group, instance and layer norms are those that ``policy`` says
    (``POLICIES``); all else that ranks exchange is waited for. A forward of other argument shapes begins
    another picture, with a warm-up; so does another prompt (``watch_prompt``: plain arguments of two or three dims
    are compared with the first step's; where they are other tensors in memory their values are, which a GPU has to
    be waited for). A forward that takes another path than the one before is run again, exchanges waited for.

    ``layers_per_message``: exchanges that share one message to each peer. ``once_per_prompt``: names, or ends of
    names, of modules that depend on the prompt alone and run once for it, such as ``("attn2.to_k", "attn2.to_v")``.

    Every rank opens and leaves it together. Yields a ``Displaced``, whose ``reset()`` begins another picture. On
    leaving, messages under way are waited for and all buffers freed. Raises ``DistPatchError`` where the model is
    not converted or open already, ``ValueError`` for an option out of range, ``RankError`` where the ranks differ.
    """
    conversion = _check(model, warmup_steps, policy, layers_per_message)
    if conversion.region.inner is not None:
        raise DistPatchError(f"displaced: {type(model).__name__} is sharded along several dims; convert it with one")
    comm = conversion.region.comm
    steps = Displaced(comm, warmup_steps, policy, layers_per_message, watch_prompt)
    named = dict(model.named_modules())
    texts = [name for name in named if any(f".{name}".endswith(f".{end}") for end in once_per_prompt)]
    for end in once_per_prompt:
        if not any(f".{name}".endswith(f".{end}") for name in texts):
            raise ValueError(f"once_per_prompt: {type(model).__name__} has no module named {end!r}")
    if comm.name:
        options = f"{policy} {warmup_steps} {layers_per_message} {texts} {watch_prompt}"
        comm.begin_call("displaced", f"({type(model).__name__}, {options})")
        if comm.size > 1 and (problem := comm.transport(comm.device or CPU).background_problem()):
            raise DistPatchError(f"displaced: {problem}")
    with ExitStack() as undo:
        if steps.is_displaced:
            for index, module in enumerate(named.values()):
                hook = partial(_entered, steps, index)
                undo.callback(module.register_forward_pre_hook(hook).remove)
        for name in texts:
            undo.callback(_once(named[name], name, steps))
        undo.enter_context(conversion.each_call_is_a_step(steps))
        _open.contexts.append(steps)
        undo.callback(_open.contexts.remove, steps)
        try:
            yield steps
        finally:
            try:
                steps.synchronize()
            finally:
                steps._forget()


def synchronize() -> None:
    """Wait for whatever displaced steps have under way: of every context that is open in this thread.

    Every rank calls it, between two forwards. Raises ``RankError``.
    """
    for steps in _open.contexts:
        steps.synchronize()


def _check(model: nn.Module, warmup_steps: int, policy: str, layers_per_message: int) -> Conversion:
    conversion = conversion_of(model)
    if conversion is None:
        raise DistPatchError(
            f"displaced: this {type(model).__name__} is not converted; call distpatch.convert_model first"
        )
    if conversion.steps is not None:
        raise DistPatchError(f"displaced: the steps of this {type(model).__name__} are displaced already")
    if (attention := conversion.options.attention) in {"all_to_all", "auto"}:
        raise DistPatchError(
            f'displaced: this {type(model).__name__} is converted with attention="{attention}", which moves queries: '
            'each rank would answer those of the last step. Convert it with attention="gather" or "ring"'
        )
    if policy not in POLICIES:
        raise ValueError(f"displaced: policy is one of {', '.join(POLICIES)}; got {policy!r}")
    if warmup_steps < 0 or layers_per_message < 1:
        raise ValueError(
            f"displaced: warmup_steps is at least 0 and layers_per_message at least 1; "
            f"got {warmup_steps} and {layers_per_message}"
        )
    return conversion


def _entered(steps: Displaced, index: int, module: nn.Module, args: Any) -> None:
    steps.entered(index)


def _once(module: nn.Module, name: str, steps: Displaced) -> Callable[[], None]:
    """Let the module run once a prompt; returns what undoes it."""
    forward, before = module.forward, module.__dict__.get("forward")

    def once(*args: Any, **kwargs: Any) -> Any:
        given = list(tensors_in((args, kwargs)))
        if any(isinstance(t, PatchTensor) for t in given):
            raise DistPatchError(
                f"once_per_prompt: {name} is given rows of the image, {[tuple(t.shape) for t in given]}; "
                "name modules that depend on the prompt alone"
            )
        key = (name, *(tuple(t.shape) for t in given))
        if key not in steps.texts:
            steps.texts[key] = forward(*args, **kwargs)
        return steps.texts[key]

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]

    module.forward = once  # type: ignore[method-assign]
    return undo
