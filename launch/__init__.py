"""Running one script on several ranks: what the examples and benchmarks share around torchrun."""

from launch.runtime import MOMENT, AbsentRanks, console, on_rank0, process_group, rank0_first

__all__ = ["MOMENT", "AbsentRanks", "console", "on_rank0", "process_group", "rank0_first"]
