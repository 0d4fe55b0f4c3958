"""Displaced steps: exactness, bytes and what is waited for."""
