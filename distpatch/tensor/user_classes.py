"""A user's own classes of tensor: rows are plain tensors, and results get back the class of what was given.

Such a class says in ``__torch_function__`` what becomes of the result of a function of its tensors (of which class it
is, which attributes go on). It is asked for whole tensors alone, as on one device, never for some rows.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from distpatch.errors import LayoutError
from distpatch.torch_utils.private import DisableTorchFunctionSubclass, no_torch_dispatch, no_torch_function


class Kind:
    """The class and the attributes of a tensor, without its data."""

    def __init__(self, tensor: Tensor) -> None:
        with DisableTorchFunctionSubclass():
            sample = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(type(tensor))
        sample.__dict__.update(tensor.__dict__)
        self.sample = sample

    def of(self, result: Tensor) -> Tensor:
        """What the class makes of a function that takes such a tensor and returns ``result``."""
        cls = type(self.sample)
        made: Tensor = cls.__torch_function__(_result, (cls,), (self.sample, result), {})
        if not isinstance(made, Tensor):
            raise LayoutError(
                f"{cls.__name__}.__torch_function__ made a {type(made).__name__} of the result of a function of its "
                "tensor. Call the model with plain tensors: x.as_subclass(torch.Tensor)."
            )
        return made


def _result(sample: Tensor, result: Tensor) -> Tensor:
    return result


@lru_cache(maxsize=256)
def is_own(cls: type) -> bool:
    """Whether it is a class of a user's own that torch asks what becomes of a function's result."""
    return (
        cls is not Tensor
        and cls.__torch_function__ is not no_torch_function  # type: ignore[attr-defined]
        and not is_wrapper(cls)
        and cls.__module__.partition(".")[0] != __name__.partition(".")[0]
    )


@lru_cache(maxsize=256)
def is_wrapper(cls: type) -> bool:
    """Whether its tensors are not what torch's operators take them for, such as those of DTensor."""
    return cls.__torch_dispatch__ is not no_torch_dispatch  # type: ignore[attr-defined]


def kind_of(tensor: Tensor) -> Kind | None:
    cls = type(tensor)
    return Kind(tensor) if cls is not Tensor and is_own(cls) else None


def plain(tensor: Tensor) -> Tensor:
    """The same tensor, of torch's own class; gradients go through."""
    if type(tensor) is Tensor or not is_own(type(tensor)):
        return tensor
    with DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)
