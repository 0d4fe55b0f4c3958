"""Tensors of the CPU that travel as a GPU's do over gloo: copied out, sent, and copied back.

``pytest --staged`` runs the suite so, over whichever of the tests' transports a test asks for.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist

from distpatch.comm.choose_transport import Factory, between, factory, using
from distpatch.comm.point_to_point import PointToPoint
from distpatch.comm.staged import Staged
from distpatch.comm.transport import Transport

_is_on = False
_until_the_end = contextlib.ExitStack()


def apply() -> None:
    """In this process, until it ends."""
    global _is_on
    _is_on = True
    _until_the_end.enter_context(using(staged))


def staged(pg: dist.ProcessGroup, device: torch.device) -> Transport:
    """To be used instead of ``choose_transport.between``."""
    return Staged(PointToPoint(pg))


def is_usual() -> bool:
    """Whether no test has put a transport in the place of the suite's."""
    return factory() is (staged if _is_on else between)


def maybe(make: Factory) -> Factory:
    """What ``make`` returns, staged where the suite runs so."""
    return (lambda pg, device: Staged(make(pg, device))) if _is_on else make
