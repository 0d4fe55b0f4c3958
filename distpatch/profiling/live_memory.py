"""How many bytes of tensors are alive at once: counted, not sampled, on any device."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from distpatch.torch_utils.private import FakeTensor, TorchDispatchMode, has_storage, is_traceable_wrapper_subclass

MIB = 1 << 20
_PLAIN = {Tensor, Parameter, FakeTensor}


class LivePeak(TorchDispatchMode):
    """Track the bytes of tensors that this thread's operations allocate and that are still alive.

    >>> with LivePeak() as live:
    ...     image = vae.decode(latents).sample
    >>> print(live.peak_bytes, live.peak_op)

    Every storage that comes out of an operation counts once, from that operation until its last tensor
    is gone; views and in-place results add nothing. What existed before (weights, inputs) is left out;
    tensors passed to ``LivePeak(...)`` or ``count`` are in, as long as they live. A sharded tensor is
    counted by the rows that this rank holds. Not seen: what a kernel allocates and frees inside one
    operation (a convolution's workspace, message buffers of an exchange), and memory that no operation
    made (``torch.from_numpy``). Tensors without data (on the meta device) take none. One object, one use.

    ``peak_bytes``: the most that was alive at once; ``peak_op``: the operation whose result made it so.
    """

    def __init__(self, *counted: Tensor) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.peak_op = ""
        self._live_bytes = 0
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        # A storage can die anywhere, also while we count, so its finalizer only leaves a note here.
        self._freed: deque[int] = deque()
        for tensor in counted:
            self.count(tensor)

    @property
    def live_bytes(self) -> int:
        """Bytes alive now."""
        self._settle()
        return self._live_bytes

    @property
    def peak_mib(self) -> float:
        return self.peak_bytes / MIB

    def count(self, tensor: Tensor, op: str = "given") -> None:
        """Count a tensor's storage from now until it is freed; once, however often it is given."""
        self._settle()
        for plain in _plain_tensors(tensor):
            storage = plain.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            known = self._storages.get(key)
            if known is None:
                self._storages[key] = (weakref.ref(storage, self._note(key)), size)
                self._live_bytes += size
            elif known[1] != size:  # resized in place
                self._storages[key] = (known[0], size)
                self._live_bytes += size - known[1]
        if self._live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_op = self._live_bytes, f"{op} {tuple(tensor.shape)}"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # which fake tensors are asked for at every turn
            return func(*args, **kwargs)
        before = {tensor.untyped_storage()._cdata for tensor in stored_tensors((args, kwargs))}
        result = self._run(func, args, kwargs)
        self._settle()
        foreign = before - self._storages.keys()  # alive before we came: views of it are not new
        for tensor in stored_tensors(result):
            if tensor.untyped_storage()._cdata not in foreign:
                self.count(tensor, str(func))
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _note(self, key: int) -> Any:
        freed = self._freed
        return lambda _: freed.append(key)

    def _settle(self) -> None:
        while self._freed:
            self._live_bytes -= self._storages.pop(self._freed.popleft())[1]


def stored_tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor among an operator's arguments or results: by hand, since there are many small trees."""
    if isinstance(tree, Tensor):
        yield from _plain_tensors(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from stored_tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from stored_tensors(item)


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors with memory of their own: of a wrapper subclass, those that it holds."""
    if type(value) in _PLAIN and has_storage(value):
        if (value.fake_device.type if type(value) is FakeTensor else value.device.type) != "meta":
            yield value
    elif isinstance(value, Tensor) and "local" in getattr(value, "__dict__", ()):  # a PatchTensor
        yield from _plain_tensors(value.local)  # type: ignore[attr-defined]
    elif isinstance(value, Tensor) and "recipe" in getattr(value, "__dict__", ()):  # one that has no rows yet
        return
    elif is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, Tensor) and has_storage(value):
        yield value
