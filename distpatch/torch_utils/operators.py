"""distpatch's own operators in torch's table, which compiled graphs call: with as little Python around them as can be.

``torch.library.custom_op`` has four more functions of Python around each call, which take longer than to post a
message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from distpatch.torch_utils.private import NEVER_REPLAYED, keep_in_order

NAMESPACE = "distpatch"
library = torch.library.Library(NAMESPACE, "FRAGMENT")
BODIES: dict[str, Callable[..., Any]] = {}  # of each operator, by its name


def collective(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Have a function of tensors, which all ranks call, called as ``torch.ops.distpatch.<name>``.

    It writes to none of its arguments and returns none of them. Every compiled graph keeps all calls of such operators,
    in one order, and no CUDA graph replays them. Returns the operator. What it makes of fake tensors is told by
    ``torch.library.register_fake``; derivatives by ``torch.library.register_autograd``: without, it is called where
    there are none to take.
    """

    def register(function: Callable[..., Any]) -> Any:
        library.define(name + torch.library.infer_schema(function, mutates_args=()), tags=NEVER_REPLAYED)
        library.impl(name, function, "CompositeExplicitAutograd")
        BODIES[name] = function
        keep_in_order(library, f"{NAMESPACE}::{name}")
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register
