"""A rank of a group that does not exist, and its transport: of its transfers only the sizes are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from distpatch.comm.communicator import Communicator, remember
from distpatch.comm.rendezvous import NoPeers
from distpatch.comm.transport import Batch, Transport
from distpatch.errors import DistPatchError

REFUSAL = "a simulated group sends nothing: it is for fake tensors (FakeTensorMode)"


class Simulated(Transport):
    """Sends nothing. What fake tensors would send is recorded by the operators (``Communicator.planned``)."""

    def post(self, batch: Batch) -> NoReturn:
        raise DistPatchError(REFUSAL)

    def all_reduce(self, tensor: Tensor, op: str) -> NoReturn:
        raise DistPatchError(REFUSAL)

    def all_gather(self, tensor: Tensor, op: str) -> NoReturn:
        raise DistPatchError(REFUSAL)

    def background_problem(self) -> str:
        return "a group that is simulated sends nothing, behind the computation or otherwise"


class SimulatedCommunicator(Communicator):
    """One rank of a group that does not exist, for fake tensors: of transfers only the shapes are known.

    ``rank`` and ``size`` of the group. Passed to ``convert_model`` in place of a group, under a
    ``FakeTensorMode``.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(None, NoPeers(rank, size))
        self._name = f"rank {rank} of {size}, simulated, {id(self)}"
        remember(self)

    @property
    def name(self) -> str:
        return self._name

    def transport(self, device: torch.device) -> Transport:
        return Simulated()

    def of_mesh(self, others: Sequence[Communicator]) -> Communicator:
        rank, size = self.rank, self.size
        for comm in others:
            rank, size = rank * comm.size + comm.rank, size * comm.size
        return SimulatedCommunicator(rank, size)

    def planned(self, kind: str, op: str, sent_bytes: int, messages: int) -> None:
        self.recorder.record(kind, op, sent_bytes, messages)
