"""From torchrun's environment to a process group and a device, and back."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

import distpatch
from distpatch.torch_utils.cores import own_cores

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

LONG = timedelta(days=7)  # for waits that end with the rank waited for: torchrun ends us if it dies
MOMENT = timedelta(seconds=5)


class AbsentRanks(distpatch.RankError):
    """Ranks that did not start, or did not reach the group's set-up, in time."""


@contextmanager
def process_group(
    *, threads: int | None = None, device: str | None = None, timeout: timedelta | None = None, bind: bool = True
) -> Iterator[tuple[dist.ProcessGroup, torch.device]]:
    """The group of all ranks that torchrun started, and this rank's device; torn down at the end.

    CUDA and NCCL where there are GPUs (or ``device="cuda"``), one GPU per process of this host, else CPU
    and gloo. Without torchrun it is a group of one. ``threads``: CPU threads of this rank; None leaves
    torch's choice (torchrun sets OMP_NUM_THREADS=1 for more than one process a host). ``timeout``: how
    long a rank waits for another before it is an error. ``bind``: on CPUs keep each rank, and
    what it starts meanwhile, on its share of the host's cores, where these suffice for the threads of all
    ranks and nobody else has chosen cores. Raises ``AbsentRanks`` where a rank does not come.
    """
    place = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    with own_cores(place, *_place_on_host(), torch.get_num_threads()) if bind else nullcontext():
        store, rank, size = _meet(timeout or c10d.default_pg_timeout)
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            timeout=timeout,
            device_id=place if place.type == "cuda" else None,  # else NCCL may take another GPU for its first message
            store=store,
            rank=rank,
            world_size=size,
        )
        try:
            group = dist.group.WORLD
            assert group is not None
            yield group, place
        finally:
            dist.destroy_process_group()


def _place_on_host() -> tuple[int, int]:
    """This rank's number among those of its host, and how many these are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _meet(patience: timedelta) -> tuple[c10d.Store, int, int]:
    """The key-value store of all ranks, this rank and the world size, once all ranks have arrived.

    ``init_process_group`` would wait for all ranks, too, but cannot say which one is missing.
    """
    if "WORLD_SIZE" not in os.environ:
        return dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    store, rank, size = next(rendezvous("env://", timeout=patience))
    keys = [f"launch/start/{peer}" for peer in range(size)]
    store.set(keys[rank], socket.gethostname())
    try:
        store.wait(keys, patience)
    except dist.DistStoreError as error:
        missing = [peer for peer, key in enumerate(keys) if not store.check([key])]
        raise AbsentRanks(
            f"rank(s) {missing} of {size} did not start within {patience.total_seconds():g} s (this is rank {rank} "
            f"on {socket.gethostname()}). Look at their output, and at whether their hosts reach this one."
        ) from error
    return store, rank, size


def _device(wanted: str | None) -> torch.device:
    if (wanted or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        return torch.device("cpu")
    (local_rank, _), gpus = _place_on_host(), torch.cuda.device_count()
    if local_rank >= gpus:
        raise SystemExit(
            f"process {local_rank} of this host has no GPU of its own: there are {gpus}. "
            f"Start at most that many (torchrun --nproc_per_node={max(gpus, 1)}), "
            'or hide them to run on the CPU (CUDA_VISIBLE_DEVICES="").'
        )
    return torch.device("cuda", local_rank)


def on_rank0(group: dist.ProcessGroup, work: Callable[[], T]) -> T | None:
    """Do something long on rank 0 only. The others wait, at no CPU time, until it is done.

    Returns the result on rank 0 and None elsewhere; where the work fails, rank 0 says why and all ranks
    exit with 1, or with the error's ``exit_code``. The wait is at the group's key-value store, so that no
    collective's timeout can end it.
    """
    store = group.get_group_store()
    key = f"launch/on_rank0/{store.add(f'launch/on_rank0/calls/{group.rank()}', 1)}"
    if group.rank() != 0:
        store.wait([key], LONG)
        outcome = store.get(key).decode()
        if outcome != "done":
            raise SystemExit(int(outcome))
        return None
    try:
        result = work()
    except BaseException as error:
        _say_why(error)  # before the others know: torchrun ends all ranks when the first one exits
        code = getattr(error, "exit_code", 1)
        store.set(key, str(code))
        raise SystemExit(code) from error
    store.set(key, "done")
    return result


def rank0_first(group: dist.ProcessGroup, load: Callable[[], T]) -> T:
    """Load something on every rank, on rank 0 first: it fills the cache, and says what is wrong, for all."""
    loaded = on_rank0(group, load)
    return load() if loaded is None else loaded


def _say_why(error: BaseException) -> None:
    if hasattr(error, "format_message"):  # of a command line: a wrong option or file
        print(f"error: {error.format_message()}", file=sys.stderr, flush=True)
    elif isinstance(error, SystemExit):
        print(error, file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def console(group: dist.ProcessGroup) -> Console:
    """A rich console that prints on rank 0 and nowhere else."""
    from rich.console import Console

    return Console(quiet=group.rank() != 0)
