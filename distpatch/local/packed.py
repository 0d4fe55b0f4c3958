"""Models, arguments and results on their way to another process: tensors in shared memory, the rest pickled."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.multiprocessing  # noqa: F401  (it teaches pickles of processes to share tensors)
from torch import Tensor, nn

from distpatch.errors import DistPatchError

SHARED = "/dev/shm"  # where torch puts tensors that processes share


class Packed(NamedTuple):
    """Anything, as it is sent: its tensors, which are shared, and the pickle of the rest, with a number for each."""

    rest: bytes
    tensors: list[Tensor]

    @staticmethod
    def of(value: Any) -> Packed:
        buffer, tensors = io.BytesIO(), []  # type: io.BytesIO, list[Tensor]
        _pickler(buffer, tensors).dump(value)
        return Packed(buffer.getvalue(), tensors)

    @property
    def state(self) -> tuple[bytes, tuple[tuple[int, int, int], ...]]:
        """What is another one when the value has changed."""
        return self.rest, tuple((id(t), t.data_ptr(), t._version) for t in self.tensors)

    @property
    def shared(self) -> Packed:
        """The same, on the CPU, for another process."""
        return Packed(self.rest, [_on_cpu(t) for t in self.tensors])

    def open(self) -> Any:
        return _Unpickler(io.BytesIO(self.rest), self.tensors).load()


def _pickler(file: io.BytesIO, tensors: list[Tensor]) -> Any:
    """By value what the caller's ``__main__`` defines, if ``cloudpickle`` is there."""
    try:
        from cloudpickle import Pickler
    except ImportError:
        from pickle import Pickler
    numbers: dict[int, int] = {}

    class WithoutTensors(Pickler):  # type: ignore[misc,valid-type]
        def persistent_id(self, value: Any) -> int | None:
            if not isinstance(value, Tensor):
                return None
            number = numbers.setdefault(id(value), len(tensors))
            if number == len(tensors):
                tensors.append(value)
            return number

    return WithoutTensors(file, protocol=pickle.HIGHEST_PROTOCOL)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def pack(value: Any, what: str) -> Packed:
    try:
        return Packed.of(value)
    except Exception as error:
        raise DistPatchError(
            f"local_group: {what} cannot be sent to other processes ({type(error).__name__}: {error}); remove what "
            "cannot be pickled, such as a hook, or install cloudpickle"
        ) from error


def _on_cpu(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return tensor if tensor.device.type == "cpu" else nn.Parameter(tensor.detach().cpu(), tensor.requires_grad)
    return tensor.detach().cpu()


def check_room(tensors: Sequence[Tensor], what: str) -> None:
    """Raise where tensors do not fit in the shared memory: to write there would end the process."""
    if not os.path.isdir(SHARED):
        return
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if type(t) in {Tensor, nn.Parameter}}
    need = sum(storage.nbytes() for storage in storages.values() if not storage.is_shared())
    free = os.statvfs(SHARED).f_bavail * os.statvfs(SHARED).f_frsize
    if need > free:
        raise DistPatchError(
            f"local_group: {what} needs {need / 2**20:.0f} MiB of shared memory, and {SHARED} has {free / 2**20:.0f}; "
            "give the container more (docker: --shm-size, Kubernetes: an emptyDir of medium Memory)"
        )
