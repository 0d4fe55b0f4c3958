"""What is gathered because no rule says otherwise: counted, reported, or refused, as the region wants it."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from distpatch.errors import UnsupportedOpError
from distpatch.tensor.patch_tensor import PatchTensor

_HOME = Path(__file__).parents[2]


def record(name: str, sharded: Sequence[PatchTensor]) -> None:
    """Count that these tensors are gathered, and say so or refuse, as the region wants it."""
    lead, region = sharded[0], sharded[0].region
    shapes = shapes_of(sharded)
    if region.options.fallback == "error":
        raise UnsupportedOpError(
            f"{name} has no sharded rule ({shapes}; rank {region.comm.rank}) and fallback='error' "
            "forbids to gather its arguments. Use fallback='warn' or 'allow', or register a rule "
            "(distpatch.register_rule)."
        )
    size_bytes = sum(t.numel() * t.element_size() for t in sharded)
    lead.comm.recorder.fallback(name, shapes, _call_site(), size_bytes)
    if region.options.fallback == "warn" and name not in region.warned:
        region.warned.add(name)
        warnings.warn(
            f"distpatch has no sharded rule for {name}: its arguments ({shapes}) are gathered on every "
            "rank. The result is right, but costs the memory of one device. See distpatch.trace().",
            stacklevel=_depth(),
        )


def shapes_of(sharded: Sequence[PatchTensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} sharded along dim {t.row_layout.dim}" for t in sharded)


def _is_of_others(file: str) -> bool:
    """Whether a file is neither of distpatch nor of torch."""
    path = Path(file)
    return _HOME not in path.parents and "torch" not in path.parts


def _call_site() -> str:
    """The innermost line outside distpatch and torch."""
    frames = reversed(traceback.extract_stack())
    return next((f"{Path(f.filename).name}:{f.lineno}" for f in frames if _is_of_others(f.filename)), "?")


def _depth() -> int:
    """How many frames above its caller the same line is, as ``warnings`` counts them."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and not _is_of_others(frame.f_code.co_filename):
        frame, depth = frame.f_back, depth + 1
    return depth
