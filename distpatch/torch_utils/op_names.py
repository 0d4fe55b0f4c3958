"""What a torch function is called in records, tables and errors."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=1024)
def op_name(func: Any) -> str:
    """``conv2d``, ``data.__set__`` of a property, ``demo.blur.default`` of ``torch.ops``."""
    func = getattr(func, "_opoverload", func)
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(func)
    if isinstance(func, (torch.jit.ScriptFunction, torch._C.ScriptMethod)):
        return str(func.name)
    name = getattr(func, "__name__", None) or str(func)
    owner = getattr(func, "__self__", None)
    return f"{owner.__name__}.{name}" if inspect.isgetsetdescriptor(owner) else name
