"""One rank: a process that waits for calls of models, and sends back what they return or raise."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from distpatch.errors import DistPatchError
from distpatch.local.packed import Packed
from distpatch.model.convert import convert_model
from distpatch.torch_utils.cores import own_cores
from distpatch.torch_utils.tree import map_tensors


class Failure(NamedTuple):
    """What a rank raised, and where."""

    rank: int
    error: Exception
    traceback: str


def random_state(home: torch.device) -> list[Tensor]:
    """Of the generators that a call may draw from; GPUs' where the caller's arguments are on one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(home)] if home.type == "cuda" else [])]


def set_random_state(states: list[Tensor], place: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1 and place.type == "cuda":
        torch.cuda.set_rng_state(states[1], place)


def serve(handle: int) -> None:
    """A rank: wait for calls on this pipe, until the caller closes it."""
    pipe = Connection(handle)
    key, rank, size, port, kind, threads, timeout = pipe.recv()
    multiprocessing.current_process().authkey = key
    models: dict[int, nn.Module] = {}
    place = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    with own_cores(place, rank, size, threads):
        _reply(pipe, rank, lambda: _join(rank, size, port, place, threads, timeout))
        with suppress(EOFError, ConnectionError):
            while True:
                message = pipe.recv_bytes()
                _reply(pipe, rank, lambda message=message: _answer(pickle.loads(message), models, place))  # type: ignore[misc]


def _join(rank: int, size: int, port: int, place: torch.device, threads: int, timeout: timedelta) -> None:
    torch.set_num_threads(threads)
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # else gloo listens where the host's name leads
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=TCPStore("127.0.0.1", port, is_master=False, timeout=timeout),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=place if place.type == "cuda" else None,
    )


def _answer(request: Any, models: dict[int, nn.Module], place: torch.device) -> tuple[Packed, list[Tensor]] | None:
    method, number, fresh, given, alive, drawn = request
    for other in set(models) - set(alive):
        del models[other]
    args, kwargs, options = given.own.open()
    if fresh is not None:
        models[number] = convert_model(fresh.own.open().to(place), dist.group.WORLD, output="rank0", **options)
    set_random_state(drawn, place)
    args, kwargs = map_tensors(lambda t: t.to(place), (args, kwargs))
    with torch.no_grad():
        entry = models[number] if method == "forward" else getattr(models[number], method)
        result = entry(*args, **kwargs)
    return (Packed.of(result).shared, random_state(place)) if dist.get_rank() == 0 else None


def _reply(pipe: Connection, rank: int, work: Callable[[], Any]) -> None:
    try:
        answer = work()
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = DistPatchError(f"{type(error).__name__}: {error}")
        answer = Failure(rank, error, text)
    pipe.send_bytes(ForkingPickler.dumps(answer))
