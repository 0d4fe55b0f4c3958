"""Planned and measured, by number of ranks."""
