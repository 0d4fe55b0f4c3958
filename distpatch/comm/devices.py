"""Which device a rank's transfers run on, and whether two ranks share one."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distpatch.comm.choose_transport import backend_name
from distpatch.errors import RankError

CPU = torch.device("cpu")


def choose(group: dist.ProcessGroup, given: torch.device | None) -> torch.device:
    """The device of this rank: that which the group is bound to, else that of the tensors (``given``), else the rank's.

    Without either it is the GPU of this process where the group has a backend of its own for GPUs, else the CPU.
    """
    bound: torch.device | None = group.bound_device_id
    if bound is not None:
        return bound
    if given is not None and given.type != "meta" and (given.type != "cpu" or backend_name(group, CPU)):
        return given
    if backend_name(group, torch.device("cuda")) in ("", "gloo") or torch.cuda.device_count() == 0:
        return CPU
    return _own_gpu()


def _own_gpu() -> torch.device:
    """The GPU that the program has set, else the one of torchrun's LOCAL_RANK."""
    if torch.cuda.is_initialized() and torch.cuda.current_device() != 0:
        return torch.device("cuda", torch.cuda.current_device())
    local_rank = os.environ.get("LOCAL_RANK")
    place = dist.get_rank() if local_rank is None else int(local_rank)
    return torch.device("cuda", place % torch.cuda.device_count())


def of_model(model: nn.Module) -> torch.device | None:
    """Where a model's parameters and buffers are: the first device that is not the CPU, None where it has none."""
    devices = [tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors]
    real = [device for device in devices if device.type != "meta"]
    return next((device for device in real if device.type != "cpu"), real[0] if real else None)


def current(device: torch.device) -> AbstractContextManager[object]:
    """The device made the current one: NCCL's communicators are made on it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def card(device: torch.device) -> str:
    """What tells one GPU of a host from another, in all its processes; nothing where that is not known."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) if device.type == "cuda" else ""


def host() -> str:
    return socket.gethostname()


def identity(group: dist.ProcessGroup, device: torch.device) -> dict[str, object]:
    """What a rank tells the others of its device before the group's channels are opened."""
    return {"device": str(device), "backend": backend_name(group, device), "host": host(), "card": card(device)}


def check(answers: Sequence[dict[str, Any]], rank: int) -> None:
    """Raise ``RankError``, on every rank alike, for devices that the ranks cannot reach each other from.

    ``answers``: every rank's ``identity``.
    """
    backends = {answer["backend"] for answer in answers}
    if len(backends) > 1:
        said = ", ".join(f"rank {r}: {a['device']} ({a['backend'] or 'no backend'})" for r, a in enumerate(answers))
        raise RankError(
            f"the ranks' tensors are on devices of different backends: {said} (this is rank {rank}). Move every "
            "rank's model to the same kind of device."
        )
    if backends != {"nccl"}:
        return
    users: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for peer, answer in enumerate(answers):
        if answer["card"]:
            users[answer["host"], answer["card"]].append(peer)
    shared = [
        f"ranks {_listed(ranks)} use one GPU, {answers[ranks[0]]['device']} ({name}) of {where}"
        for (where, name), ranks in users.items()
        if len(ranks) > 1
    ]
    if shared:
        raise RankError(
            f"{'; '.join(shared)} (this is rank {rank}). NCCL takes one rank a GPU. Call "
            'torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) before anything else, then move the model to that '
            "GPU (model.cuda()); start at most one process a GPU."
        )


def _listed(ranks: Iterable[int]) -> str:
    *others, last = map(str, ranks)
    return f"{', '.join(others)} and {last}"
