"""Two ranks, one of them slowed on purpose, with rows shared in many ways: run ``python -m benchmarks.unequal``."""
