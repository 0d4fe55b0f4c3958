"""Kernels that a call launches, counted as torch's dispatcher sees them: by operator, and by the torch function."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from distpatch.torch_utils import chunk_sizes
from distpatch.torch_utils.chunk_sizes import planned_as
from distpatch.torch_utils.operators import BODIES

NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "resize_", "set_", "is_same_size", "_local_scalar_dense", "detach")
EXCHANGES = "distpatch"  # namespace of the operators that exchange rows, and of the collectives
Kinds = Counter[tuple[str, str]]  # (torch function that was called, operator that ran)


def take_sizes_of_gpus() -> None:
    """From now on CPU tensors are computed in as many parts as a GPU's, for times; before any call, as plans are kept."""
    chunk_sizes.BY_KIND["cpu"] = chunk_sizes.ELSEWHERE


class Kernels(TorchDispatchMode):
    """Counts operators that compute or copy in this thread, those inside distpatch's exchanges included.

    Not views, memory without values, messages, and what has no elements. ``kinds``: by the torch function, the outermost, and
    by the operator; ``as_on``: of the device whose sizes the rules choose by.
    """

    def __init__(self, as_on: str = "cuda") -> None:
        super().__init__()
        self.kinds: Kinds = Counter()
        self.op = ""
        self._functions, self._sizes = _Functions(self), planned_as(as_on)

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    @property
    def names(self) -> Counter[str]:
        """By operator."""
        names: Counter[str] = Counter()
        for (_, name), times in self.kinds.items():
            names[name] += times
        return names

    @property
    def ops(self) -> Counter[str]:
        """By the torch function that was called."""
        ops: Counter[str] = Counter()
        for (op, _), times in self.kinds.items():
            ops[op] += times
        return ops

    def __enter__(self) -> Kernels:
        self._sizes.__enter__()
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)
        self._sizes.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        run = BODIES[func._schema.name.split("::")[1]] if func.namespace == EXCHANGES else _parts(func)
        if run is not None:  # what it is made of under the mode, too
            super().__enter__()
            try:
                return run(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        result = _on_meta(func, args, kwargs) if _is_of_gpus(func) else func(*args, **kwargs)
        if _computes(func) and any(isinstance(t, Tensor) and t.numel() for t in tree_leaves((args, kwargs, result))):
            self.kinds[self.op or "backward", func._overloadpacket.__name__] += 1
        return result


class _Functions(TorchFunctionMode):
    """Tells which torch function is called: the outermost, as the model's code has it."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self.kernels.op:
            return func(*args, **(kwargs or {}))
        self.kernels.op = str(getattr(func, "__name__", func))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.kernels.op = ""


def _computes(func: Any) -> bool:
    """Whether an operator computes or copies: not a view, and not memory without values."""
    if func.namespace in {"prim", "c10d"} or _is_view(func):
        return False
    return not func._overloadpacket.__name__.startswith(NO_KERNEL)


def _is_view(func: Any) -> bool:
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def _parts(func: Any) -> Any:
    """What ``contiguous`` and the like are made of, which may copy or not: torch asks where autograd is off."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return func.decompose if _is_view(func) and func.has_kernel_for_dispatch_key(key) else None


def _is_of_gpus(func: Any) -> bool:
    """Attention that a CPU has no kernel for."""
    name = func._overloadpacket.__name__
    return name.startswith("_scaled_dot_product") and not name.endswith("for_cpu")


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """Zeros of the result's shape."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    return tree_map_only(Tensor, lambda t: torch.zeros_like(t, device="cpu"), func(*args, **kwargs))
