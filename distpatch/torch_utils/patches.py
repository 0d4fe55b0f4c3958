"""Functions of torch that distpatch replaces, from when the first sharded tensor can exist: docs/torch-changes.md.

Rules say what is to be replaced (``register``) when they are imported; torch is as it was until ``install``.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import threading
import types
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(eq=False)
class Patch:
    """``owner.name``, a class's attribute or a module's function, is ``replacement``.

    ``original``: what it was when it was replaced last. ``imported``: torch's own function, where other modules' names
    of it are replaced too.
    """

    owner: Any
    name: str
    replacement: Any
    original: Any
    imported: Any = None
    inherited: bool = False  # the owner itself does not have it
    in_place: bool = False

    def put(self) -> None:
        if self.in_place:
            return
        self.in_place = True
        self.original = inspect.getattr_static(self.owner, self.name)
        self.inherited = self.name not in vars(self.owner)
        taken = _bound_methods(self)
        setattr(self.owner, self.name, self.replacement)
        _bind_anew(taken, self)
        _warn_of_those_left(taken)
        if self.imported is not None:
            _rename(self.imported, self.replacement)

    def take_back(self) -> None:
        """Put the original back. What somebody else has put on top since stays, and calls the replacement."""
        if not self.in_place or inspect.getattr_static(self.owner, self.name) is not self.replacement:
            return
        self.in_place = False
        taken = _bound_methods(self)
        if self.inherited:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)
        _bind_anew(taken, self)
        if self.imported is not None:
            _rename(self.replacement, self.imported)


_patches: list[Patch] = []
_lock = threading.Lock()
_installed = False


def register(owner: Any, name: str, replacement: Any, *, by_name: bool = False) -> Patch:
    """Have ``owner.name`` replaced when the patches are installed; the replacement calls the patch's ``original``."""
    original = inspect.getattr_static(owner, name)
    patch = Patch(owner, name, replacement, original, original if by_name else None)
    _patches.append(patch)
    return patch


def install() -> None:
    """Put all replacements in place; they stay until ``uninstall``."""
    global _installed
    if torch.compiler.is_dynamo_compiling() or _installed:
        return
    with _lock:
        for patch in _patches:
            patch.put()
        _installed = True


def uninstall() -> None:
    """Put torch's own functions back."""
    global _installed
    with _lock:
        for patch in reversed(_patches):
            patch.take_back()
        _installed = False


def _rename(old: Any, new: Any) -> None:
    """Modules that have imported a function by name get the new one; distpatch itself keeps both."""
    ours = __name__.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or name.partition(".")[0] == ours:
            continue
        for key, value in list(vars(module).items()):
            if value is old:
                setattr(module, key, new)


def _bound_methods(patch: Patch) -> list[Any]:
    """What was taken from subclasses of the owner as they are now, such as ``f = MyFunction.apply``."""
    now = inspect.getattr_static(patch.owner, patch.name)
    if not isinstance(patch.replacement, classmethod):
        return []
    kinds = (types.MethodType, types.BuiltinMethodType)
    methods = [method for method in gc.get_objects() if type(method) in kinds]
    return [m for m in methods if _is_subclass(m.__self__, patch.owner) and m == now.__get__(None, m.__self__)]


def _is_subclass(cls: Any, owner: type) -> bool:
    return issubclass(type(cls), type) and cls is not owner and issubclass(cls, owner)


def _bind_anew(methods: list[Any], patch: Patch) -> None:
    """Whatever holds one of these bound methods (a module, an object, a class, a container) gets that of now."""
    if not methods:
        return
    now = inspect.getattr_static(patch.owner, patch.name)
    new = {id(method): now.__get__(None, method.__self__) for method in methods}
    for holder in gc.get_referrers(*methods):
        if holder is not methods:
            _replace_in(holder, new)


def _replace_in(holder: Any, new: dict[int, Any]) -> None:
    """Put what is new in the place of what a holder has; one that cannot be written to is itself replaced."""
    kind = type(holder)
    if kind is types.CellType:
        holder.cell_contents = new[id(holder.cell_contents)]
    elif kind is list:
        holder[:] = _renewed(holder, new)
    elif kind is functools.partial:
        func = new.get(id(holder.func), holder.func)
        holder.__setstate__((func, tuple(_renewed(holder.args, new)), holder.keywords, holder.__dict__))
    elif kind is types.FunctionType:  # a default value
        holder.__defaults__ = new.get(id(holder.__defaults__), holder.__defaults__)
    elif kind in {tuple, staticmethod}:
        made = tuple(_renewed(holder, new)) if kind is tuple else staticmethod(new[id(holder.__func__)])
        for outer in gc.get_referrers(holder):
            _replace_in(outer, {id(holder): made})
    else:
        held = holder if kind is dict else getattr(holder, "__dict__", None)
        if type(held) is dict:
            _replace_values(held, {key: new[id(value)] for key, value in held.items() if id(value) in new})


def _renewed(values: Iterable[Any], new: dict[int, Any]) -> list[Any]:
    return [new.get(id(value), value) for value in values]


def _replace_values(held: dict[Any, Any], values: dict[Any, Any]) -> None:
    if "__module__" not in held:
        held.update(values)
        return
    for owner in gc.get_referrers(held):  # the dict of a class is not written to
        if isinstance(owner, type):
            for key, value in values.items():
                setattr(owner, key, value)


def _warn_of_those_left(methods: list[Any]) -> None:
    """What could not be replaced would lose gradients without a word."""
    ours = 3  # the list, the loop, the argument
    left = sorted({f"{m.__self__.__qualname__}.{m.__name__}" for m in methods if sys.getrefcount(m) > ours})
    if left:
        warnings.warn(
            f"{', '.join(left)} was taken from its class before anything was sharded, and is held where distpatch "
            "cannot replace it (docs/torch-changes.md): of sharded tensors it has no gradients. Take it after "
            "distpatch.convert_model, or call it through its class.",
            stacklevel=2,
        )
