"""How much to take at a time, by the kind of device: what stays in a CPU's cache, or keeps a GPU's launches few.

Rules ask ``kind_of`` and ``sizes_of`` and not a tensor for its device where they choose how to compute: so that a
plan can be made for a device that this machine, or this build of torch, does not have.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Sizes:
    """``workspace_bytes``: input and output of one convolution, with ``splits="auto"``. ``part_bytes``: rows that are
    copied to put them beside their halo, in at most ``most_parts`` parts; ``joined_bytes``: so many are, even where
    only those at the seams need it: fewer launches (chosen by count; no GPU was measured).
    ``chunk_bytes``: deferred rows, evaluated where no window says how many. ``statistics_bytes``: rows of one reading
    for a norm, of which half precision is copied in fp32; ``reads_twice``: whether a second reading of these comes
    from a cache. ``bucket_bytes``: gradients, or rows of a gather, that are moved together. ``whole_bytes``: the
    activations of a call that every rank may compute whole, if that is faster (``convert_model(policy="auto")``).
    """

    workspace_bytes: int
    part_bytes: int
    most_parts: int
    joined_bytes: int
    chunk_bytes: int
    statistics_bytes: int
    reads_twice: bool
    bucket_bytes: int
    whole_bytes: int


# A CPU computes a large tensor faster in patches that stay in its cache. A GPU has none of use here, and a few
# microseconds for each launch: there the sizes only bound the memory.
BY_KIND = {"cpu": Sizes(8 * MIB, 8 * MIB, 8, 0, MIB, 512 * KIB, True, 32 * MIB, 256 * MIB)}
ELSEWHERE = Sizes(256 * MIB, 256 * MIB, 8, 8 * MIB, 256 * MIB, 128 * MIB, False, 256 * MIB, 1024 * MIB)


class _Planned(threading.local):
    """``kind``: of the device that this thread plans for; None in a real run."""

    kind: str | None = None


planned_for = _Planned()


def kind_of(device: torch.device) -> str:
    """The kind of device to choose sizes for: the tensor's ("cpu", "cuda", ...), or the one that is planned for."""
    return planned_for.kind or device.type


def sizes_for(kind: str) -> Sizes:
    return BY_KIND.get(kind, ELSEWHERE)


def sizes_of(device: torch.device) -> Sizes:
    return BY_KIND.get(planned_for.kind or device.type, ELSEWHERE)


@contextmanager
def planned_as(kind: str) -> Iterator[None]:
    """In this thread, choose sizes as for another kind of device than the tensors'."""
    before, planned_for.kind = planned_for.kind, kind
    try:
        yield
    finally:
        planned_for.kind = before
