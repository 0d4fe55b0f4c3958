"""What a converted model is called with: what the ranks compare, and what is refused."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distpatch.comm.meshes import Dims
from distpatch.model.entrance import Entrance, is_image
from distpatch.tensor.patch_tensor import PatchTensor, axes_in
from distpatch.tensor.region import Region
from distpatch.tensor.user_classes import is_wrapper
from distpatch.torch_utils.private import FakeTensor, FunctionalTensor
from distpatch.torch_utils.tree import leaves_in, streams_in, tensors_in


def signature_of(given: Sequence[Tensor]) -> str:
    """What must be the same on all ranks of a call: shapes, dtypes, layouts, and whether gradients are wanted."""
    described = []
    for tensor in given:
        layout = "".join(f" {part.row_layout}" for part in axes_in(tensor))
        shape = tuple(operator.index(n) for n in tensor.shape)  # a compiled graph is made for this shape alone
        described.append(f"{shape} {tensor.dtype}{layout}")
    grads = " with gradients" if torch.is_grad_enabled() else ""
    return "(" + ", ".join(described) + ")" + grads


def problem_of(entrance: Entrance, call: tuple[Any, Any], given: Sequence[Tensor], region: Region) -> str | None:
    """Why a call with these arguments (``given``: the tensors among them) cannot be sharded, or None."""
    named = entrance.named(*call)
    problem = next((found for t in given if (found := _foreign(t, region))), None)
    problem = problem or (
        _not_images(entrance.dim, call, given) if named is None else _misnamed(entrance, named, given)
    )
    return problem and f"{entrance.what}: {problem}"


def _not_images(dim: Dims, call: Any, given: Sequence[Tensor]) -> str | None:
    """Why there is no image among the arguments, or one that cannot be sharded along ``dim``."""
    dims = (dim,) if isinstance(dim, int) else dim
    images = [tensor for tensor in given if is_image(tensor)]
    if not images and (torch.compiler.is_dynamo_compiling() or not streams_in(call)):
        return (
            f"no argument can be sharded: an image is a floating-point tensor of at least 4 dims "
            f"(B, C, H, W); the tensors given are: {_shapes(given)}.{_way_out(call, given)}"
        )
    for tensor in images:
        if not isinstance(tensor, PatchTensor) and not _are_spatial(dims, tensor.ndim):
            return (
                f"dim={dim} is out of range for an argument of shape "
                f"{tuple(tensor.shape)}: rows are sharded along one of its spatial dims "
                f"{2 - tensor.ndim}..-1 (convert_model(..., dim=...))"
            )
    return None


def _are_spatial(dims: Sequence[int], ndim: int) -> bool:
    """Whether these are different dims behind the batch and the channels."""
    places = {dim % ndim for dim in dims if -ndim <= dim < ndim}
    return len(places) == len(dims) and min(places) >= 2


def _misnamed(entrance: Entrance, named: dict[str, tuple[Any, int]], given: Sequence[Tensor]) -> str | None:
    """Why the arguments that are sharded by name cannot be."""
    for name, (value, dim) in named.items():
        for tensor in tensors_in(value):
            if not isinstance(tensor, PatchTensor) and not -tensor.ndim <= dim < tensor.ndim:
                dims = (
                    f"one of its dims {-tensor.ndim}..{tensor.ndim - 1}" if tensor.ndim else "it has none: leave it out"
                )
                return (
                    f"argument {name!r} of shape {tuple(tensor.shape)} cannot be sharded along dim {dim}: say {dims} "
                    f"(convert_model(..., shard={{{name!r}: ...}}))"
                )
            if tensor.layout is not torch.strided:
                return f"argument {name!r} of shape {tuple(tensor.shape)} has layout {tensor.layout}: pass x.to_dense()"
    if any(isinstance(leaf, (Tensor, Iterator)) for value, _ in named.values() for leaf in leaves_in(value)):
        return None
    return (
        f"no argument can be sharded: none that shard= names ({', '.join(entrance.splits)}) was given a tensor; the "
        f"tensors given are: {_shapes(given)}"
    )


def _shapes(given: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in given) or "none"


def _foreign(tensor: Tensor, region: Region) -> str | None:
    """Why a tensor that is another group's, or not dense in memory, cannot take part, or None."""
    if isinstance(tensor, PatchTensor):
        if [axis.comm for axis in tensor.region.axes] == [axis.comm for axis in region.axes]:
            return None
        return (
            f"an argument of shape {tuple(tensor.shape)} is sharded over another group than the model's: "
            "gather it first (distpatch.gather)"
        )
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
        if not any(axis.comm.has_peers for axis in region.axes):
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


_OF_TOKENS = (
    ' Tokens (B, N, C): convert_model(..., shard={"hidden_states": 1}) says which argument is sharded, and where.'
)


def _way_out(call: Any, given: Sequence[Tensor]) -> str:
    """What the caller can do who has images of another form."""
    for tensor in given:
        if tensor.is_quantized:
            return " Pass a quantised image as x.dequantize()."
        if tensor.ndim == 3 and tensor.is_floating_point():
            many = sum(t.ndim == 3 for t in given) > 1
            return _OF_TOKENS + (
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
