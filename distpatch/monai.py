"""MONAI's inferers: the whole volume, exactly, in place of sliding windows. It needs ``monai``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from monai.inferers.inferer import Inferer
from torch import Tensor, nn

from distpatch.comm.meshes import Mesh
from distpatch.model.convert import convert_model, is_converted
from distpatch.model.restore import restore_model
from distpatch.tensor.patch_tensor import gather
from distpatch.torch_utils.tree import map_tensors


class WholeInferer(Inferer):  # type: ignore[misc]
    """``network(inputs)`` of whole volumes, of which each rank of a group computes its rows.

    >>> inferer = WholeInferer(group, dim=-3)
    >>> logits = inferer(volume, net)  # every rank calls it; (B, C, D, H, W), as net(volume) on one device

    Windows that slide over a volume are normalised one by one and see nothing beyond their edges: their results are
    others than the net's. ``labels``: results are the classes with the largest logits, (B, 1, D, H, W), found on each
    rank's rows: no rank holds the logits of the whole. ``group`` and ``options`` as of ``convert_model``, but for
    ``output``. A network is converted at its first call and stays so until ``restore``.
    """

    def __init__(self, group: Mesh | None = None, *, labels: bool = False, **options: Any) -> None:
        super().__init__()
        if "output" in options:
            raise ValueError("WholeInferer: every rank gets the whole result; there is no choice of output")
        self.group, self.labels, self.options = group, labels, options
        self._converted: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The network's result; raises ``TypeError`` for what is no ``nn.Module``, and what ``convert_model`` does."""
        if not isinstance(network, nn.Module):
            raise TypeError(f"WholeInferer: the network is an nn.Module, to be converted; got {type(network).__name__}")
        if not is_converted(network):
            output = "shard" if self.labels and self.group is not None else "gather"
            convert_model(network, self.group, output=output, **self.options)
            self._converted.add(network)
        result = network(inputs, *args, **kwargs)
        return gather(map_tensors(_labels, result) if self.labels else result)  # however it was converted

    def restore(self) -> None:
        """Undo the conversion of all networks that it has converted; every rank calls it."""
        for network in list(self._converted):
            restore_model(network)
        self._converted.clear()


def _labels(logits: Tensor) -> Tensor:
    return torch.argmax(logits, 1, keepdim=True)
