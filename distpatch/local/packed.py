"""Models, arguments and results on their way to another process: tensors in shared memory, the rest pickled."""

from __future__ import annotations

import io
import operator
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch.multiprocessing  # it teaches pickles of processes to share tensors
from torch import Tensor, nn

from distpatch.errors import DistPatchError

SHARED = "/dev/shm"  # where torch puts tensors that processes share
SUMMED_WORDS = 1 << 24  # at a time: 128 MiB


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
    def shared(self) -> Packed:
        """The same, on the CPU, for another process."""
        return Packed(self.rest, [_on_cpu(t) for t in self.tensors])

    @property
    def own(self) -> Packed:
        """The same, for this process alone: copied is what a call may write to, which is all but weights."""
        return Packed(self.rest, [t if isinstance(t, nn.Parameter) else t.clone() for t in self.tensors])

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


class State:
    """What was sent, to tell whether it is still what the caller has.

    Tensors and their storages are held, so that no new one can be taken for them. Of what the ranks have copies of, the
    words of memory are summed up: a write through ``.data`` counts no version. ``shared``: the ranks compute on the
    CPU, and see themselves what is written to the caller's weights there.
    """

    def __init__(self, packed: Packed, *, shared: bool) -> None:
        self.rest, self.tensors, self.shared = packed.rest, packed.tensors, shared
        self.parts = [part for tensor in packed.tensors for part in _plain_parts(tensor)]
        self.storages = [part.untyped_storage() for part in self.parts]
        self.sums = self._sums(self.parts)

    def is_of(self, packed: Packed) -> bool:
        if self.rest != packed.rest or len(self.tensors) != len(packed.tensors):
            return False
        parts = [part for tensor in packed.tensors for part in _plain_parts(tensor)]
        same = all(map(operator.is_, self.tensors, packed.tensors)) and len(parts) == len(self.parts)
        storages = zip(self.storages, parts)
        return (
            same and all(s._cdata == p.untyped_storage()._cdata for s, p in storages) and self.sums == self._sums(parts)
        )

    @torch.no_grad()
    def _sums(self, tensors: Sequence[Tensor]) -> list[int]:
        """Of the memory that the ranks do not see: another number when any word of it has changed."""
        copied = [t for t in tensors if not (self.shared and isinstance(t, nn.Parameter) and t.is_cpu)]
        return [int(total) for total in [total for t in copied for total in _words(t)]]  # all are launched, then read


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, or those that one of a class such as a quantised one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(tensor, name))
    else:
        yield tensor


def _words(tensor: Tensor) -> Iterator[Tensor]:
    storage = tensor.untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
    whole = memory.numel() // 8 * 8
    factors = torch.arange(min(whole // 8, SUMMED_WORDS), device=tensor.device) * 0x1E3779B97F4A7C15 | 1
    for words in memory[:whole].view(torch.int64).split(SUMMED_WORDS):
        yield words.mul(factors[: len(words)]).sum()
    yield memory[whole:].sum()


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
