"""Nets of every kind, ranks against one process with as many threads: run ``python -m benchmarks.breadth``."""
