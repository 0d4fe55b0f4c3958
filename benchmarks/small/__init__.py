"""Small pictures, where ranks wait more than they compute: run ``python -m benchmarks.small``."""
