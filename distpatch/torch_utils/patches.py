"""Functions of torch that distpatch replaces, from when the first sharded tensor can exist: docs/torch-changes.md.

Rules say what is to be replaced (``register``) when they are imported; torch is as it was until ``install``.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
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
        setattr(self.owner, self.name, self.replacement)
        if self.imported is not None:
            _rename(self.imported, self.replacement)

    def take_back(self) -> None:
        """Put the original back. What somebody else has put on top since stays, and calls the replacement."""
        if not self.in_place or inspect.getattr_static(self.owner, self.name) is not self.replacement:
            return
        self.in_place = False
        if self.inherited:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)
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
