"""From torchrun's environment to a process group and a device, and back."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

LONG = timedelta(days=7)  # for waits that end with the rank waited for: torchrun ends us if it dies


@contextmanager
def process_group(
    *, threads: int | None = None, device: str | None = None, timeout: timedelta | None = None
) -> Iterator[tuple[dist.ProcessGroup, torch.device]]:
    """The group of all ranks that torchrun started, and this rank's device; torn down at the end.

    CUDA and NCCL where there are GPUs (or ``device="cuda"``), one GPU per process of this host, else CPU
    and gloo. Without torchrun it is a group of one. ``threads``: CPU threads of this rank; None leaves
    torch's choice (torchrun sets OMP_NUM_THREADS=1 for more than one process a host). ``timeout``: how
    long a rank waits for another before it is an error.
    """
    place = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    launched = "WORLD_SIZE" in os.environ
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        timeout=timeout,
        device_id=place if place.type == "cuda" else None,
        store=None if launched else dist.HashStore(),  # type: ignore[attr-defined]
        rank=-1 if launched else 0,
        world_size=-1 if launched else 1,
    )
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group, place
    finally:
        dist.destroy_process_group()


def _device(wanted: str | None) -> torch.device:
    if (wanted or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
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
    exit. The wait is at the group's key-value store, so that no collective's timeout can end it.
    """
    store = group.get_group_store()
    key = f"launch/on_rank0/{store.add(f'launch/on_rank0/calls/{group.rank()}', 1)}"
    if group.rank() != 0:
        store.wait([key], LONG)
        if store.get(key) != b"done":
            raise SystemExit(1)
        return None
    try:
        result = work()
    except BaseException as error:
        _say_why(error)  # before the others know: torchrun ends all ranks when the first one exits
        store.set(key, "failed")
        raise SystemExit(1) from error
    store.set(key, "done")
    return result


def rank0_first(group: dist.ProcessGroup, load: Callable[[], T]) -> T:
    """Load something on every rank, on rank 0 first: it fills the cache, and says what is wrong, for all."""
    loaded = on_rank0(group, load)
    return load() if loaded is None else loaded


def _say_why(error: BaseException) -> None:
    if isinstance(error, SystemExit):
        print(error, file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def console(group: dist.ProcessGroup) -> Console:
    """A rich console that prints on rank 0 and nowhere else."""
    from rich.console import Console

    return Console(quiet=group.rank() != 0)
