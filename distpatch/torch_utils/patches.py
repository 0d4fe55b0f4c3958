"""Functions of torch that distpatch replaces, from when the first sharded tensor can exist: see docs/torch-changes.md.

Rules say what is to be replaced (``register``), when they are imported; nothing is before ``install``.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Patch:
    """``owner.name`` is ``replacement``: a class's attribute, or a module's function.

    ``by_name``: also wherever another module has the function under a name of its own.
    """

    owner: Any
    name: str
    replacement: Any
    original: Any
    by_name: bool
    own: bool  # whether the owner has the attribute itself, or inherits it


_patches: list[Patch] = []
_lock = threading.Lock()
_installed = False


def register(owner: Any, name: str, replacement: Any, *, by_name: bool = False) -> None:
    """Have ``owner.name`` replaced whenever the patches are installed."""
    original = inspect.getattr_static(owner, name)
    _patches.append(Patch(owner, name, replacement, original, by_name, name in vars(owner)))


def install() -> None:
    """Put all replacements in place; they stay until ``uninstall``."""
    global _installed
    if torch.compiler.is_dynamo_compiling() or _installed:
        return
    with _lock:
        for patch in _patches:
            setattr(patch.owner, patch.name, patch.replacement)
            if patch.by_name:
                _rename(patch.original, patch.replacement)
        _installed = True


def uninstall() -> None:
    """Put torch's own functions back."""
    global _installed
    with _lock:
        for patch in _patches if _installed else ():
            if patch.own:
                setattr(patch.owner, patch.name, patch.original)
            else:
                delattr(patch.owner, patch.name)
            if patch.by_name:
                _rename(patch.replacement, patch.original)
        _installed = False


def _rename(old: Any, new: Any) -> None:
    """Other modules that have imported a function by name get the new one."""
    ours = __package__.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or name.partition(".")[0] == ours:
            continue
        for key, value in list(vars(module).items()):
            if value is old:
                setattr(module, key, new)
