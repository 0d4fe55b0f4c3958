"""Messages between ranks by collectives alone, for a machine whose point-to-point transfers are broken.

Slow on purpose: every rank receives everyone's messages, and their sizes are read back to the host. Used only
where ``self_test`` found that point to point gives wrong rows, or none, and said so.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from distpatch.group import Communicator, attempt


def relay(
    comm: Communicator,
    op: str,
    to: list[int],
    outgoing: list[Tensor],
    source: list[int],
    landing: list[Tensor],
    *,
    device: torch.device,
) -> None:
    """As ``exchange.post``, by all_gather. Every rank of the group calls it, also one with nothing to send.

    ``outgoing`` and ``landing``: flat, contiguous tensors, one a peer; ``device``: that of all tensors of this
    exchange. Raises ``RankError`` as a transfer does.
    """
    messages = {peer: message.view(torch.uint8) for peer, message in zip(to, outgoing, strict=True)}
    in_order = [messages[peer] for peer in sorted(messages)]
    sizes = torch.tensor([messages[peer].numel() if peer in messages else 0 for peer in range(comm.size)])
    table = _gather(comm, op, sizes.to(device)).tolist()  # table[a][b]: bytes from rank a to rank b
    longest = max(map(sum, table))
    if longest == 0:
        return
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    if in_order:
        flat = torch.cat(in_order)
        mine[: flat.numel()] = flat
    everyone = _gather(comm, op, mine)
    for peer, message in zip(source, landing, strict=True):
        start, size = sum(table[peer][: comm.rank]), table[peer][comm.rank]
        message.view(torch.uint8).copy_(everyone[peer, start : start + size])


def _gather(comm: Communicator, op: str, mine: Tensor) -> Tensor:
    """(ranks, *shape) of every rank's flat tensor of one shape."""
    everyone = mine.new_empty((comm.size, *mine.shape))
    passes = comm.size - 1
    with comm.recorder.transfer("all_gather", op, passes * mine.numel() * mine.element_size(), passes, mine.device):
        attempt(comm, op, lambda: dist.all_gather_single(everyone.view(-1), mine, group=comm.pg), None)
    return everyone
