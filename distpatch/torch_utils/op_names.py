"""What a torch function is called in records, tables and errors."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch

from distpatch.torch_utils.private import OpOverload, OpOverloadPacket, ScriptMethod


@lru_cache(maxsize=1024)
def op_name(func: Any) -> str:
    """``conv2d``, ``data.__set__`` of a property, ``demo.blur.default`` of ``torch.ops``."""
    func = getattr(func, "_opoverload", func)
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        return str(func)
    if isinstance(func, (torch.jit.ScriptFunction, ScriptMethod)):
        return str(func.name)
    name = getattr(func, "__name__", None) or str(func)
    owner = getattr(func, "__self__", None)
    return f"{owner.__name__}.{name}" if inspect.isgetsetdescriptor(owner) else name
