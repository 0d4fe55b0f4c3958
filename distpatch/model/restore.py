"""``restore_model``: the model is as it was before ``convert_model``; what it kept of its activations is made plain."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from distpatch.errors import DistPatchError
from distpatch.model.calls import conversion_of
from distpatch.model.convert import unwrap
from distpatch.tensor.patch_tensor import LeftTensor, PatchTensor, axes_in, handed_back
from distpatch.tensor.region import Region
from distpatch.torch_utils import patches
from distpatch.torch_utils.tree import map_tensors, tensors_in

M = TypeVar("M", bound=nn.Module)
SHOWN = 5


def restore_model(model: M) -> M:
    """Undo ``convert_model``: the model is as it was, and runs on this device alone.

    Every rank of the group calls it: sharded tensors that the model keeps between calls (in buffers, attributes,
    containers and objects of any of its modules, class attributes, what its hooks have closed over) are gathered.
    Those that are kept elsewhere raise ``DistPatchError`` when a function meets them; ``distpatch.gather`` takes them.

    Raises ``DistPatchError`` where the model is not converted, or keeps sharded tensors and the group is closed, and
    ``RankError`` where it keeps some and a rank is missing or keeps others.
    """
    conversion = conversion_of(model)
    if conversion is None:
        raise DistPatchError(f"restore_model: this {type(model).__name__} is not converted")
    region = conversion.region
    if kept := list(_kept(model, region)):
        names = ", ".join(f"{where} {tuple(x.shape)}" for where, x in kept)
        if conversion.ranks.closed:
            raise DistPatchError(
                f"restore_model: {type(model).__name__} keeps sharded tensors that cannot be gathered, as the process "
                f"group is closed: {names}. Restore models before destroy_process_group, or drop these (= None)."
            )
        conversion.ranks.begin_call(f"{type(model).__name__}: restore_model", names)
        known: dict[int, tuple[Tensor, Tensor]] = {}

        def gathered(tensor: Tensor) -> Tensor:
            if not _is_kept(tensor, region):
                return tensor
            if id(tensor) not in known:
                known[id(tensor)] = tensor, handed_back(tensor)
            return known[id(tensor)][1]

        for holder, name, value in _held(model):
            plain = map_tensors(gathered, value, in_place=True, modules=True)
            if plain is value:
                continue
            if isinstance(holder, type):
                setattr(holder, name, plain)
            else:
                holder.__dict__[name] = plain
    unwrap(model)
    left = [x for x in _sharded_tensors() if x.region.conversion is region.conversion]
    parts = {id(part) for x in left for part in list(axes_in(x))[1:]}  # which the tensors that they belong to ask for
    for x in left:
        if id(x) not in parts:
            x.materialize()  # nothing is deferred beyond the model
            x.__class__ = LeftTensor
    return model


def restore_torch() -> None:
    """Put back the functions of torch that distpatch has replaced, until something is sharded again.

    docs/torch-changes.md lists them. Raises ``DistPatchError`` while sharded tensors exist, which would meet torch's
    own functions: hand them out (``distpatch.gather``) or drop them first. Converted models stay converted.
    """
    gc.collect()
    if shapes := [tuple(x.shape) for x in _sharded_tensors()]:
        raise DistPatchError(f"restore_torch: {len(shapes)} sharded tensors exist, of shapes {shapes[:SHOWN]}")
    patches.uninstall()


def _sharded_tensors() -> list[PatchTensor]:
    """All that exist in this process, but those that a restored model has left behind."""
    sharded = {id(cls) for cls in (PatchTensor, *PatchTensor.__subclasses__()) if cls is not LeftTensor}
    return [x for x in gc.get_objects() if id(type(x)) in sharded and "region" in x.__dict__]


def _held(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """What each module holds under which name, and the classes of modules that are not torch's."""
    classes: dict[type, None] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name != "_modules":
                yield module, name, value
        classes.update(dict.fromkeys(type(module).__mro__))
    for cls in classes:
        if not cls.__module__.startswith(("torch.", "builtins")):
            for name, value in list(vars(cls).items()):
                if not callable(value):
                    yield cls, name, value


def _kept(model: nn.Module, region: Region) -> Iterator[tuple[str, PatchTensor]]:
    """Every sharded tensor that the model keeps, and where; in the same order on all ranks."""
    names = {module: name for name, module in model.named_modules()}
    for holder, name, value in _held(model):
        where = holder.__name__ if isinstance(holder, type) else names[holder] or type(holder).__name__
        for tensor in tensors_in(value, modules=True):
            if _is_kept(tensor, region):
                assert isinstance(tensor, PatchTensor)
                yield f"{where}.{name}", tensor


def _is_kept(tensor: Tensor, region: Region) -> bool:
    """Whether it is sharded, and not of another converted model."""
    return isinstance(tensor, PatchTensor) and tensor.region.conversion in (None, region.conversion)
