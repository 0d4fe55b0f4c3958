"""Which torch functions the host's time goes to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

OUTSIDE = "the model and the call"  # what is outside of torch functions


class Functions(TorchFunctionMode):
    """CPU seconds of this thread, and calls, by the torch function that was called: the outermost, with its rule."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = str(getattr(func, "__name__", func))
        self.calls[name] += 1
        started = time.thread_time()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - started


def milliseconds_by_function(call: Callable[[], object], rounds: int) -> tuple[dict[str, float], Counter[str]]:
    """Of each function the least of the rounds, and its calls; what is timed adds about a microsecond to a call."""
    least: dict[str, float] = {}
    for _ in range(rounds):
        started = time.thread_time()
        with Functions() as functions:
            call()
        whole = time.thread_time() - started
        found = {**functions.seconds, OUTSIDE: whole - sum(functions.seconds.values())}
        least = {name: min(1e3 * seconds, least.get(name, 1e9)) for name, seconds in found.items()}
    return least, functions.calls
