"""Messages between ranks by collectives alone, for a machine whose point-to-point transfers are broken.

Slow on purpose: every rank receives everyone's messages, and their sizes are read back to the host. Used only
where ``self_test`` found that point to point gives wrong rows, or none, and said so.
"""

from __future__ import annotations

import torch

from distpatch.comm.point_to_point import as_bytes
from distpatch.comm.transport import Batch, Layer, Transport, Works


class ByAllGather(Layer):
    """Every rank of the group posts every batch, also one with nothing to send; it has ended when it returns."""

    def __init__(self, inner: Transport, rank: int, size: int) -> None:
        super().__init__(inner)
        self.rank, self.size = rank, size

    def post(self, batch: Batch) -> Works:
        messages = {peer: as_bytes(message) for peer, message in zip(batch.to, batch.outgoing, strict=True)}
        in_order = [messages[peer] for peer in sorted(messages)]
        sizes = torch.tensor([messages[peer].numel() if peer in messages else 0 for peer in range(self.size)])
        # table[a][b]: bytes from rank a to rank b
        table = self.inner.all_gather(sizes.to(batch.device), batch.op).tolist()
        longest = max(map(sum, table))
        if longest == 0:
            return []
        mine = torch.zeros(longest, dtype=torch.uint8, device=batch.device)
        if in_order:
            flat = torch.cat(in_order)
            mine[: flat.numel()] = flat
        everyone = self.inner.all_gather(mine, batch.op)
        for peer, message in zip(batch.source, batch.landing, strict=True):
            start, size = sum(table[peer][: self.rank]), table[peer][self.rank]
            as_bytes(message).copy_(everyone[peer, start : start + size])
        return []

    def background_problem(self) -> str:
        return "point to point is broken between these ranks (self_test): no transfer can run behind the computation"
