"""``distpatch doctor`` on a rank whose backend is at fault, or which stops: ``faulty_doctor.py corrupt|stop RANK PEER``."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import Any

from distpatch import launch
from distpatch.cli import app
from distpatch.comm import point_to_point
from distpatch.comm.transport import Batch

KIND, RANK, PEER, *OPTIONS = sys.argv[1:]


def corrupting(send: Any) -> Any:
    """A backend's batch of messages, of which one to ``PEER`` arrives otherwise than it was sent."""
    corrupted = []

    def send_batch(pg: Any, batch: Batch, collects: bool) -> Any:
        if int(PEER) in batch.to and not corrupted:
            corrupted.append(batch)
            outgoing = [t + (peer == int(PEER)) for peer, t in zip(batch.to, batch.outgoing, strict=True)]
            batch = replace(batch, outgoing=outgoing)
        return send(pg, batch, collects)

    return send_batch


if os.environ["RANK"] == RANK:
    if KIND == "corrupt":
        point_to_point.send_batch = corrupting(point_to_point.send_batch)
    else:
        with launch.process_group(device="cpu"):
            time.sleep(60)
app(["doctor", "--device", "cpu", *OPTIONS])
