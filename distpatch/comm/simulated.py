"""The transport of a rank of a group that does not exist: of its transfers only the sizes are known."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

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
