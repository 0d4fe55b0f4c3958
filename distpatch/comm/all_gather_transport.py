"""Messages between ranks by collectives alone, for a machine whose point-to-point transfers are broken.

Slow on purpose: every rank receives everyone's messages, and their sizes are read back to the host. Used only
where ``self_test`` found that point to point gives wrong rows, or none, and said so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distpatch.comm.transport import Batch, Transport, Works, as_bytes
from distpatch.profiling.trace import Recorder


class ByAllGather(Transport):
    """Every rank of the group starts every batch, also one with nothing to send; it has ended when it returns."""

    collective = True

    def __init__(self, inner: Transport, rank: int, size: int, recorder: Recorder) -> None:
        self.inner, self.rank, self.size, self.recorder = inner, rank, size, recorder

    def start(self, batch: Batch) -> Works:
        messages = {peer: as_bytes(message) for peer, message in zip(batch.to, batch.outgoing, strict=True)}
        in_order = [messages[peer] for peer in sorted(messages)]
        sizes = torch.tensor([messages[peer].numel() if peer in messages else 0 for peer in range(self.size)])
        table = self._gather(batch.op, sizes.to(batch.device)).tolist()  # table[a][b]: bytes from rank a to rank b
        longest = max(map(sum, table))
        if longest == 0:
            return []
        mine = torch.zeros(longest, dtype=torch.uint8, device=batch.device)
        if in_order:
            flat = torch.cat(in_order)
            mine[: flat.numel()] = flat
        everyone = self._gather(batch.op, mine)
        for peer, message in zip(batch.source, batch.landing, strict=True):
            start, size = sum(table[peer][: self.rank]), table[peer][self.rank]
            as_bytes(message).copy_(everyone[peer, start : start + size])
        return []

    def all_reduce(self, tensor: Tensor) -> None:
        self.inner.all_reduce(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.inner.all_gather(tensor)

    def _gather(self, op: str, mine: Tensor) -> Tensor:
        passes = self.size - 1
        with self.recorder.transfer("all_gather", op, passes * mine.nbytes, passes, mine.device):
            return self.inner.all_gather(mine)
