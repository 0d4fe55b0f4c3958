"""What a converted model is called with: which tensors are images, what the ranks compare, and what is refused."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distpatch.comm.communicator import Communicator
from distpatch.comm.meshes import Dims
from distpatch.tensor.patch_tensor import PatchTensor, axes_in
from distpatch.tensor.region import Region
from distpatch.tensor.user_classes import is_wrapper
from distpatch.torch_utils.private import FakeTensor, FunctionalTensor
from distpatch.torch_utils.tree import streams_in


def is_image(tensor: Tensor) -> bool:
    return isinstance(tensor, PatchTensor) or (tensor.is_floating_point() and tensor.ndim >= 4)


def signature_of(given: Sequence[Tensor]) -> str:
    """What must be the same on all ranks of a call: shapes, dtypes, layouts, and whether gradients are wanted."""
    described = []
    for tensor in given:
        layout = "".join(f" {part.row_layout}" for part in axes_in(tensor))
        shape = tuple(operator.index(n) for n in tensor.shape)  # a compiled graph is made for this shape alone
        described.append(f"{shape} {tensor.dtype}{layout}")
    grads = " with gradients" if torch.is_grad_enabled() else ""
    return "(" + ", ".join(described) + ")" + grads


def problem_of(what: str, call: Any, given: Sequence[Tensor], dim: Dims, region: Region) -> str | None:
    """Why a call with these arguments (``given``: the tensors among them) cannot be sharded, or None."""
    comm, dims = region.comm, (dim,) if isinstance(dim, int) else dim
    for tensor in given:
        if not isinstance(tensor, PatchTensor) and (problem := _foreign(tensor, comm)):
            return f"{what}: {problem}"
    images = [tensor for tensor in given if is_image(tensor)]
    if not images and (torch.compiler.is_dynamo_compiling() or not streams_in(call)):
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in given) or "none"
        return (
            f"{what}: no argument can be sharded: an image is a floating-point tensor of at least 4 dims "
            f"(B, C, H, W); the tensors given are: {shapes}.{_way_out(call, given)}"
        )
    for tensor in images:
        if isinstance(tensor, PatchTensor):
            if [axis.comm for axis in tensor.region.axes] != [axis.comm for axis in region.axes]:
                shape = tuple(tensor.shape)
                return (
                    f"{what}: an argument of shape {shape} is sharded over another group than the model's: "
                    "gather it first (distpatch.gather)"
                )
        elif not _are_spatial(dims, tensor.ndim):
            return (
                f"{what}: dim={dim} is out of range for an argument of shape "
                f"{tuple(tensor.shape)}: rows are sharded along one of its spatial dims "
                f"{2 - tensor.ndim}..-1 (convert_model(..., dim=...))"
            )
    return None


def _are_spatial(dims: Sequence[int], ndim: int) -> bool:
    """Whether these are different dims behind the batch and the channels."""
    places = {dim % ndim for dim in dims if -ndim <= dim < ndim}
    return len(places) == len(dims) and min(places) >= 2


def _foreign(tensor: Tensor, comm: Communicator) -> str | None:
    """Why a tensor that is not dense in memory cannot take part, or None."""
    name = type(tensor).__name__
    if torch.compiler.is_dynamo_compiling():
        if type(tensor) in {Tensor, nn.Parameter}:
            return None
        return f"a compiled call takes plain tensors, not a {name}: pass x.as_subclass(torch.Tensor)"
    if tensor.is_nested:
        return (
            "a nested tensor has images of several heights, which have no rows in common: call the model for each "
            "(x.unbind()), or pad them to one size (torch.nested.to_padded_tensor)"
        )
    if isinstance(tensor, FakeTensor):
        if not comm.has_peers:
            return None
        return f"a {name} has no values to send to other ranks: use distpatch.plan for a call on fake tensors"
    if is_wrapper(type(tensor)) and not isinstance(tensor, FunctionalTensor):
        plain = "x.full_tensor()" if hasattr(tensor, "full_tensor") else "a plain tensor of its values"
        return (
            f"an argument of shape {tuple(tensor.shape)} is a {name}, whose own dispatch would meet the rules for "
            f"rows: pass {plain}, the same on every rank"
        )
    if is_image(tensor) and tensor.layout is not torch.strided:
        return f"an image of shape {tuple(tensor.shape)} has layout {tensor.layout}: pass x.to_dense()"
    return None


def _way_out(call: Any, given: Sequence[Tensor]) -> str:
    """What the caller can do who has images of another form."""
    for tensor in given:
        if tensor.is_quantized:
            return " Pass a quantised image as x.dequantize()."
        if tensor.ndim == 3 and tensor.is_floating_point():
            many = sum(t.ndim == 3 for t in given) > 1
            return (
                " Images without a batch (C, H, W), of several sizes: call the model for each as x.unsqueeze(0), or "
                "pad them to one size and torch.stack them."
                if many
                else " An image without a batch (C, H, W): pass x.unsqueeze(0), and take the result's [0]."
            )
        if tensor.ndim >= 3:
            batch = ".unsqueeze(0)" if tensor.ndim == 3 else ""
            if tensor.is_complex():
                return (
                    f" A complex image: pass its real and imaginary part as channels, torch.cat([x.real, x.imag], -3)"
                    f"{batch}, or torch.view_as_real(x).movedim(-1, -3)."
                )
            as_float = "x.float() / 255" if tensor.dtype == torch.uint8 else "x.float()"
            return f" An image of {tensor.dtype}: pass ({as_float}){batch}, in the range that the model was trained on."
        if tensor.ndim == 2 and tensor.is_floating_point():
            return " An image without batch and channels (H, W): pass x[None, None]."
    kinds = {type(value).__module__.partition(".")[0] for value in _values(call)}
    if "numpy" in kinds:
        return " Of a numpy array: pass torch.from_numpy(x), in the order (B, C, H, W)."
    if "PIL" in kinds:
        return " Of a PIL image: pass torchvision's to_tensor(x).unsqueeze(0)."
    return ""


def _values(call: Any) -> Iterator[Any]:
    """The arguments, and the items of their lists and dicts."""
    if isinstance(call, (list, tuple)):
        for item in call:
            yield from _values(item)
    elif isinstance(call, dict):
        yield from _values(list(call.values()))
    else:
        yield call
