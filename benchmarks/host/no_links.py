"""One rank of a group whose other ranks do not exist: what it sends goes nowhere, what it is sent is whatever is there.

torch's fake backend, in whose store the other ranks say what this one does, at the same time. So the host's time is
that of a group with links that cost nothing: all of distpatch runs, the handshake included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed import fake_pg

assert fake_pg  # imported for the backend


class Echo(dist.Store):
    """A store at which ``ranks`` meet, of which one exists: what it adds to where they arrive, all of them add."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.held: dict[str, bytes] = {}

    def clone(self) -> Echo:
        return self

    def set(self, key: str, value: Any) -> None:
        self.held[key] = _bytes(value)

    def get(self, key: str) -> bytes:
        return self.held[key]

    def add(self, key: str, amount: int) -> int:
        total = int(self.held.get(key, b"0")) + amount * (self.ranks if "/arrived/" in key else 1)
        self.held[key] = str(total).encode()
        return total

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        if self.held.get(key, b"") == _bytes(expected):
            self.held[key] = _bytes(desired)
        return self.held[key]

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self.held for key in keys)

    def wait(self, keys: Sequence[str], timeout: object = None) -> None:
        assert self.check(keys), f"nobody writes {keys}"

    def deleteKey(self, key: str) -> bool:  # noqa: N802  (torch's name)
        return self.held.pop(key, None) is not None

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.held[key] for key in keys]


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


@contextmanager
def rank_without_links(world: int) -> Iterator[dist.ProcessGroup]:
    """This process is rank 0 of ``world`` while it is open."""
    options, store = FakeProcessGroup.Options(), Echo(world)  # held here: torch holds the half of it that is C++
    dist.init_process_group("fake", store=store, rank=0, world_size=world, pg_options=options)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
