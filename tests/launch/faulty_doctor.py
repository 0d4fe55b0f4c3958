"""``distpatch doctor`` on a rank whose backend is at fault, or which stops: ``faulty_doctor.py corrupt|stop RANK PEER``."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch.distributed as dist

from distpatch import launch
from distpatch.cli import app

KIND, RANK, PEER, *OPTIONS = sys.argv[1:]


def corrupting(send: Any) -> Any:
    """A backend's batch of messages, of which one to ``PEER`` arrives otherwise than it was sent."""
    corrupted = []

    def batch(ops: list[Any]) -> Any:
        for op in ops:
            if op.op is dist.isend and op.group_peer == int(PEER) and not corrupted:
                op.tensor = op.tensor + 1
                corrupted.append(op)
        return send(ops)

    return batch


if os.environ["RANK"] == RANK:
    if KIND == "corrupt":
        dist.batch_isend_irecv = corrupting(dist.batch_isend_irecv)
    else:
        with launch.process_group(device="cpu"):
            time.sleep(60)
app(["doctor", "--device", "cpu", *OPTIONS])
