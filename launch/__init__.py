"""Running one script on several ranks: what the examples and benchmarks share around torchrun."""

from launch.runtime import console, on_rank0, process_group, rank0_first

__all__ = ["console", "on_rank0", "process_group", "rank0_first"]
